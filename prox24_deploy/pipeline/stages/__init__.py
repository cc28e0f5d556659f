"""Each stage: what it depends on, and who does its work."""
