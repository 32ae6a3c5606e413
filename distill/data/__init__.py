"""Images: random numbers by counter, the order of an epoch, view policies, data sets."""
