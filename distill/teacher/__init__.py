"""The frozen teacher, its cached logits on disk, its report."""
