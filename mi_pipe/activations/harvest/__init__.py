"""The write side of the activation store: from a plan of rows and batches to committed shards with statistics."""
