"""The stages in order, and what a run reads once."""
