"""Models: where they come from, how they are loaded, what their hook points are called."""
