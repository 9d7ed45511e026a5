"""The speed and memory of a harvest beside the bare forward pass, TransformerLens' cache and SAELens' runner."""
