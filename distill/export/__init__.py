"""A finished network as a file for others: written, loaded back, compared."""
