"""The ONNX side: export a module, compare it with PyTorch, prove the 2:4 pattern on the file."""
