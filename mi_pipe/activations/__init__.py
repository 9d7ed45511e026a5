"""Activations: the store's layout, the harvest that fills it, and the readers (ordered, shuffled, frames)."""
