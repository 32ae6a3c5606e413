"""The losses of distillation, a file each."""
