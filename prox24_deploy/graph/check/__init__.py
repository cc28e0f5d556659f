"""The proof on files: every constant that feeds a product is 2:4, not 2:4, or not proven."""
