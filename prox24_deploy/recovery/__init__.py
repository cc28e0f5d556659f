"""Recover what pruning cost: train the kept weights against the dense model, masks fixed."""
