"""The reference pages are generated from the code, so that they cannot drift."""
