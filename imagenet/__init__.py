"""Distillation on ImageNet, and on any photos in folders laid out like it."""
