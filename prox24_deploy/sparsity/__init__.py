"""What 2:4 sparsity is: the pattern, its groups, who may run it, and how files declare it."""
