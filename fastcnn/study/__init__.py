"""Studies: configurations trained over several seeds, compared in one table."""
