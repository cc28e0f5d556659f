"""The pruned PyTorch model with its layers compressed, and the times of GEMMs that choose them."""
