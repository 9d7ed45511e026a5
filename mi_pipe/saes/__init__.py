"""Sparse autoencoders: architectures, the sparse training step, training, evaluation, and the trained set."""
