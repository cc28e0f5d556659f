"""Hand a finished bundle over: Triton, vLLM, bill of materials, checksums, model card."""
