"""Steering: a direction is added to activations while the model runs; what it writes then, and what that costs."""
