"""What an exported file computes, against PyTorch."""
