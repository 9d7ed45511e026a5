"""What attention heads do: their patterns, and scores of the patterns that are known by name."""
