"""Files that survive and are never trusted: checkpoints, downloads, locks."""
