"""From a module to an ONNX file that says which weights must be 2:4."""
