"""The speed of activation patching beside TransformerLens' own."""
