"""A run on disk: its directory, its outcome, what computed it."""
