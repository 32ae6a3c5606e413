"""A page on trained networks: what is measured, how it is drawn and written."""
