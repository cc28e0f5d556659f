"""Pure numerics of 2:4 pruning: tensors in, tensors out."""
