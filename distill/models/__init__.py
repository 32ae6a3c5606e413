"""Networks by name, their input, and weights into them."""
