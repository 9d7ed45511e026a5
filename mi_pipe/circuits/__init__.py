"""Circuits: the graph of a model's parts, edge scores, pruning and faithfulness."""
