"""Exact activation patching: metrics, an engine that restarts at the patched layer, sweeps, stored effects."""
