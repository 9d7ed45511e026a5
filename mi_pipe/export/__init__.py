"""Activations in and out of other programs' formats: HDF5, SAELens' cached activations, safetensors, NumPy."""
