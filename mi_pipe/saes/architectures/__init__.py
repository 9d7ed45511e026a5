"""The architectures: a file each, with formula and source."""
