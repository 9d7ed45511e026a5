"""A sweep: which SAEs to train, from lists of options, and what each is called."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mi_pipe.core.errors import ConfigError
from mi_pipe.saes.architecture import Architecture, ArchitectureName
from mi_pipe.saes.batchtopk import BatchTopK
from mi_pipe.saes.topk import TopK


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train."""

    hook: str
    architecture: ArchitectureName
    k: int
    d_sae: int
    seed: int

    @property
    def name(self) -> str:
        """Folder-safe name.

        >>> SAESpec("blocks.15.hook_resid_post", "topk", 32, 4608, 0).name
        'L15.resid_post.topk.k32.d4608.s0'
        """
        return f"{short_hook(self.hook)}.{self.architecture}.k{self.k}.d{self.d_sae}.s{self.seed}"

    def build(self, n_steps: int) -> Architecture:
        """Return the architecture, for a training of `n_steps`."""
        return TopK(self.k) if self.architecture == "topk" else BatchTopK(self.k, n_steps)


def short_hook(hook: str) -> str:
    """Return a short name of a hook point.

    >>> short_hook("blocks.3.attn.hook_z"), short_hook("hook_embed")
    ('L3.attn.z', 'embed')
    """
    parts = [part.removeprefix("hook_") for part in hook.split(".")]
    if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit():
        parts = [f"L{parts[1]}", *parts[2:]]
    return ".".join(parts)


def grid(
    hooks: Sequence[str],
    architectures: Sequence[ArchitectureName],
    ks: Sequence[int],
    widths: Sequence[int],
    seeds: Sequence[int],
) -> list[SAESpec]:
    """Return the product of all options, hook by hook; raises ConfigError for impossible or repeated ones."""
    specs = [SAESpec(*options) for options in itertools.product(hooks, architectures, ks, widths, seeds)]
    for spec in specs:
        if spec.k > spec.d_sae:
            raise ConfigError(f"saes: k={spec.k} is more than d_sae={spec.d_sae}. Use a smaller k or a larger d_sae.")
    repeated = [name for name, n in Counter(spec.name for spec in specs).items() if n > 1]
    if repeated:
        raise ConfigError(f"saes: the sweep has {repeated[0]} more than once. Give each option once.")
    return specs
