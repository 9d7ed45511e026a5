"""Round trips of SAEs through other programs' folders, with those programs' own loaders and savers."""
