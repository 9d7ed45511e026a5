"""Training batches from the activation store: random blocks into a pool, rows out of it, exact state."""
