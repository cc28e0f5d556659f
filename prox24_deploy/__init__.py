"""prox24-deploy: from a Hugging Face model to a 2:4-sparse, proven and measured release.

Importing this package loads neither torch nor any engine; each stage imports what it needs.
"""

__version__ = "0.1.0"
