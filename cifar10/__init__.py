"""CIFAR-10, and any other set of small images: networks, data, views, recipes, entry scripts."""
