"""Activations and SAEs in and out of other programs' formats: HDF5, SAELens, sparsify, safetensors, NumPy, more."""
