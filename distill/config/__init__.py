"""What a run is asked to be: recipe, flags, and what is printed."""
