"""The middle floor: one file a batch step, each a function (config, inputs, workspace) -> main figures."""
