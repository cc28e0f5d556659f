"""A residual stream in a basis in which 2:4 drops less, which the weights of a model absorb."""
