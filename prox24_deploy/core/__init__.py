"""What every room may import: types, records, the catalogue of metrics, errors, files. No torch."""
