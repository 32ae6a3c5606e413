"""The only loop and the only backward(); optimisers; evaluation; stopping."""
