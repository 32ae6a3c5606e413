"""Feature distillation: where stages end, and losses on what comes out there."""
