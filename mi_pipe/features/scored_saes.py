"""Which SAEs of a set can be scored on given activations, what they read there, and on which rows.

An SAE reads one hook point or several side by side (crosscoders; `other:hook` lies in a second store). Rows that are
massive at any of its hook points are left out, as in its training.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from mi_pipe.activations.training.source import OTHER, RowSource
from mi_pipe.core.errors import ConfigError
from mi_pipe.features.logit_effects import writes_to_residual
from mi_pipe.saes.sae_set import SAESet
from mi_pipe.saes.sites import Sites

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 28
"""Largest piece of a block that is read at once."""


@dataclass(frozen=True)
class ScoredSAE:
    """One SAE as far as its config says."""

    name: str
    sites: Sites
    d_sae: int

    @property
    def effects_of(self) -> str:
        """The hook point whose part of the decoder reaches the logits; "" if there is none.

        Of several it is the last of the first store's, whose model is the one that is known.
        """
        found = [hook for hook in self.sites.outputs if not hook.startswith(OTHER) and writes_to_residual(hook)]
        return found[-1] if found else ""


def scored_saes(saes: SAESet, widths: Mapping[str, int], where: str, tell: bool = False) -> list[ScoredSAE]:
    """Return the SAEs that can be scored on activations, given the width of each hook point that `where` (an id) holds.

    Those that read a second store are left out where there is none; the log says so if `tell`. Raises ConfigError if an
    SAE reads a hook point that is not stored, or is stored with another width, or if no SAE is left.
    """
    found, left_out = [], []
    has_other = any(hook.startswith(OTHER) for hook in widths)
    for name in saes.names:
        config = saes.config_of(name)
        sites = Sites(**{key: tuple(value) for key, value in config["sites"].items()})
        if any(hook.startswith(OTHER) for hook in sites.inputs) and not has_other:
            left_out.append(name)
            continue
        _check_widths(name, sites, widths, where)
        found.append(ScoredSAE(name, sites, config["d_sae"]))
    told = f"no second store of activations (saes.other_store) is given, which {', '.join(left_out)} read"
    if not found:
        raise ConfigError(f"Nothing can be scored: {told}.")
    if left_out and tell:
        logger.warning("%s: %s; not scored", saes.id, told)
    return found


def _check_widths(name: str, sites: Sites, widths: Mapping[str, int], where: str) -> None:
    for hook, width in zip(sites.inputs, sites.input_widths, strict=True):
        if hook not in widths:
            raise ConfigError(f"The SAE {name} reads {hook}, which {where} does not hold: it has {', '.join(widths)}.")
        if width != widths[hook]:
            raise ConfigError(f"The SAE {name} reads vectors of width {width}; {hook} in {where} has {widths[hook]}.")


def is_scored(source: RowSource, sites: Sites) -> Bool[np.ndarray, " row"]:
    """Say which rows are massive at none of an SAE's hook points, as far as `source` holds those that it writes."""
    masks = [~source.massive(hook) for hook in sites.hooks if hook in source.hooks]
    return np.logical_and.reduce(masks)


def read_pieces(
    source: RowSource, sites: Sites, kept: Bool[np.ndarray, " row"], start: int, stop: int
) -> Iterator[tuple[Int64[np.ndarray, " row"], Float32[np.ndarray, "row d_in"]]]:
    """Yield (row numbers, what an SAE reads there) of the rows from `start` up to `stop` that `kept` picks, in order.

    The pieces depend on the widths alone, so that the same rows give the same bits in every run.
    """
    n_rows = max(1, _READ_BYTES // (4 * sum(sites.input_widths)))
    for first in range(start, stop, n_rows):
        last = min(first + n_rows, stop)
        here = kept[first:last]
        parts = [source.read_rows(hook, first, last)[here] for hook in sites.inputs]
        yield first + np.flatnonzero(here), parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
