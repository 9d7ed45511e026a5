"""Mending damaged artifacts by making again just what is damaged."""
