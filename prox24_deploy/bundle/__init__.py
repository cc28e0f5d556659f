"""A release bundle: stages run once, the manifest, verification, the paths within."""
