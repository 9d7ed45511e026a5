"""Lenses: what the residual stream says of the next token at each depth."""
