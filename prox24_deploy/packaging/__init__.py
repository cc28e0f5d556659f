"""Hand a finished bundle over: Triton, bill of materials, checksums, model card."""
