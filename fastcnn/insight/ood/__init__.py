"""Out-of-distribution scores of a trained network."""
