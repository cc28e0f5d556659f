"""The Hugging Face side: open a model directory, calibrate, prune, evaluate."""
