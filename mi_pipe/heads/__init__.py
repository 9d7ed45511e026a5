"""What single attention heads do: their weights, what they copy, compose with and write to the logits, and classes."""
