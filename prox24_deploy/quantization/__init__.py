"""Quantise a model to FP8 or INT8: ranges, scales, and rounding on a mask."""
