"""Similarity of activations: between tokens, layers and models, by cosine, CKA and common nearest neighbours."""
