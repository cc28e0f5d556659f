"""A Hugging Face model: its directory, its layers, what it writes, and the pruned directory."""
