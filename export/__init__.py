"""Export recipes, one TOML per model family; installed as `prox24_deploy.recipes`."""
