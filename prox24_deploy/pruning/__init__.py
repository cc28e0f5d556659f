"""Prune a model block by block: activations, second moments, which layers, and how."""
