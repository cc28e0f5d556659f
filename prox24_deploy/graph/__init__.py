"""The ONNX side: export a module and prove the 2:4 pattern on the file."""
