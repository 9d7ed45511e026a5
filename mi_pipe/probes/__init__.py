"""Probes: what can be read from activations by a trained classifier or regressor."""
