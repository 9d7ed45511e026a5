"""Patches at one hook point, one a row of a batch: which pair, which part of the value, which positions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.patching.patterns import is_pattern, z_hook
from mi_pipe.patching.runs import PairRuns
from mi_pipe.patching.sae_parts import is_sae_part, whole_hook

Read = Callable[[Float[Tensor, "pair pos width"]], Float[Tensor, "row few width"]]
"""Takes a pair and some positions of it for each row."""


def edited_hook(hook: str) -> str:
    """Return the hook point whose value is replaced for a donor value of `hook`: a pattern's is one of z."""
    return z_hook(hook) if is_pattern(hook) else whole_hook(hook)


@dataclass(frozen=True)
class Patches:
    """Replaces part of the base run's value at a hook point by the donor value, in each row another part."""

    hook: str
    """Whose donor value is put in; for a pattern that is a value of z, for part of an SAE one of its hook point."""
    pair: Int[Tensor, " row"]
    """Which pair's base run is patched, and whose donor values are used."""
    part: Int[Tensor, " row"] | None = None
    """Which part of the width (a head, a neuron) is replaced; None for all of it."""
    part_width: int = 0
    """Columns of a part."""
    pos: Int[Tensor, " row"] | None = None
    """The one position that is replaced; None for all."""
    first_pos: int = 0
    """No row changes anything before this position."""
    feature: Int[Tensor, " row"] | None = None
    """Of the chosen features of an SAE, the number of the one that is replaced; None for all of them."""

    @property
    def edited_hook(self) -> str:
        """The hook point whose value is replaced."""
        return edited_hook(self.hook)

    def columns(self) -> Int[Tensor, "row column"]:
        """Return the columns that are replaced, where a part is."""
        assert self.part is not None, "the whole width is replaced"
        return self.part[:, None] * self.part_width + torch.arange(self.part_width, device=self.pair.device)

    def replaced(
        self, base: Float[Tensor, "row pos width"], donor: Float[Tensor, "row pos width"], first_pos: int
    ) -> Float[Tensor, "row pos width"]:
        """Return `base` with what the patches replace; both begin at position `first_pos`."""
        mask = self._mask(base.shape[1], base.shape[2], first_pos)
        donor = donor.to(base.dtype)
        return donor if mask is None else torch.where(mask, donor, base)

    def donor(self, runs: PairRuns, read: Read) -> Float[Tensor, "row few width"]:
        """Return what takes the place of the edited hook point's value; `read` picks each row's pair and positions."""
        donor = read(runs.donors[self.hook])
        if not is_sae_part(self.hook):
            return donor
        assert runs.saes is not None, "parts are of SAEs"
        whole = read(runs.base[self.edited_hook])
        change = runs.saes.written(self.hook, donor - read(runs.base[self.hook]), self.feature)
        return whole + change.to(whole.dtype)

    def edit(self, runs: PairRuns, first_pos: int = 0) -> Callable[[Tensor], Tensor]:
        """Return the hook function that replaces, for values that begin at `first_pos`.

        A module's own value may be without batch, (row * pos, width).
        """
        donor = self.donor(runs, lambda value: value[self.pair, first_pos:])
        return lambda value: self.replaced(value.reshape(donor.shape), donor, first_pos).view(value.shape)

    def _mask(self, n_pos: int, width: int, first_pos: int) -> Bool[Tensor, "row mask_pos mask_width"] | None:
        device = self.pair.device
        mask = None
        if self.part is not None:
            mask = (torch.arange(width, device=device) // self.part_width == self.part[:, None])[:, None]
        if self.pos is not None:
            here = (torch.arange(first_pos, first_pos + n_pos, device=device) == self.pos[:, None])[:, :, None]
            mask = here if mask is None else mask & here
        return mask
