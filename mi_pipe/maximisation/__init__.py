"""Maximisation: where a neuron, head, direction or feature is largest, in stored text and in inputs made for it."""
