"""What user and family say: options, recipes, limits. No torch."""
