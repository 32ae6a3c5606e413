"""Knowledge distillation of image classifiers: what every data set shares.

Importing this package imports nothing else, so that a wrong flag is answered before torch is loaded.
"""
