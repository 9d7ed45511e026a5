"""SAEs in and out of other programs' folders: SAELens, sparsify, dictionary_learning (out only)."""
