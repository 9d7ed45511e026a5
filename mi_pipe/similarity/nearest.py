"""Nearest rows by cosine, by comparing all with all, a block of rows at a time."""

import numpy as np
from jaxtyping import Float, Int

from mi_pipe.similarity.sides import blocks


def nearest(
    values: Float[np.ndarray, "row d"],
    k: int,
    order: Int[np.ndarray, " row"] | None = None,
    groups: Int[np.ndarray, " row"] | None = None,
) -> Int[np.ndarray, "row k"]:
    """Return the k rows of the largest cosine with each row, itself left out, the nearest first.

    Of equally near rows the first in `order` (a permutation) are taken; rows of one group (default:
    each row its own) are no neighbours.
    """
    order = np.arange(len(values)) if order is None else order
    groups = np.arange(len(values)) if groups is None else groups
    # Equal rows have one column of products: a matrix product rounds equal columns differently.
    distinct, which = np.unique(values, axis=0, return_inverse=True)
    norms = np.linalg.norm(distinct, axis=1, keepdims=True)
    unit = np.divide(distinct, norms, out=np.zeros_like(distinct), where=norms > 0)
    found = np.empty((len(values), k), np.int64)
    for rows in blocks(len(values)):
        cosines = (unit[which[rows]] @ unit.T)[:, which[order]]
        cosines[groups[rows, None] == groups[order]] = -np.inf
        found[rows] = order[np.argsort(-cosines, axis=1, kind="stable")[:, :k]]
    return found


def overlap(first: Int[np.ndarray, "row k"], second: Int[np.ndarray, "row k"]) -> Float[np.ndarray, " row"]:
    """Return the share of each row's neighbours that are neighbours in both.

    >>> overlap(np.array([[1, 2]]), np.array([[2, 3]])).tolist()
    [0.5]
    """
    return (first[:, :, None] == second[:, None, :]).any(2).mean(1)
