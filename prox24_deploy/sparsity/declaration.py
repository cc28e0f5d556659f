"""How a file says which of its weights must be 2:4."""

# Metadata of safetensors and of ONNX files: names of weights, of tensors with their axis.
SPARSE_KEY = "prox24.sparse_weights"
