"""TensorRT and TensorRT-RTX: build in a process of its own, run, read what the builder chose."""
