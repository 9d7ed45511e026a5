"""Firings made from a dense (row, feature) matrix, the plain form that tests compare with."""

import numpy as np
import torch
from hypothesis import strategies as st

from mi_pipe.features.firings import Firings, starts_of
from mi_pipe.saes.code import SparseCode


def firings_of(dense, first_feature=0):
    feature, row = np.nonzero(dense.T > 0)
    return Firings(first_feature, starts_of(feature, dense.shape[1]), row, dense[row, feature].astype(np.float32))


def code_of(dense):
    """An encoder that leaves rows as they are: the sparse code of a dense matrix, zeros and all."""
    n_rows, d_sae = dense.shape
    features = torch.arange(d_sae, dtype=torch.int32).expand(n_rows, d_sae)
    return SparseCode.from_rows(features, dense, d_sae)


def sparse_matrix(n_rows, n_features, share, seed, n_levels=None):
    """A random matrix in which `share` of the entries fire; few levels make ties."""
    rng = np.random.default_rng(seed)
    shape = (n_rows, n_features)
    values = rng.random(shape) + 0.01 if n_levels is None else rng.integers(1, n_levels + 1, shape)
    return np.where(rng.random(shape) < share, values, 0).astype(np.float32)


matrices = st.builds(
    sparse_matrix,
    n_rows=st.integers(0, 60),
    n_features=st.integers(1, 8),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 10_000),
    n_levels=st.sampled_from([None, 1, 3]),
)
