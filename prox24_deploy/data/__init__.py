"""Samples to calibrate on and to judge by: text, pairs, images, recordings."""
