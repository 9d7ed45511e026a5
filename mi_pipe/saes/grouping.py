"""Which SAEs are trained together: as many of the same sites as memory takes, since they share a pass over the data.

Nothing passes between SAEs of a group, so results do not depend on it.
"""

import itertools

import psutil
import torch

from mi_pipe.saes.sweep import SAESpec

_FLOAT_BYTES = 4
_STATE_COPIES = 3
"""Weights and two moments; what a checkpoint holds."""
_WORKING_COPIES = 5
"""Those, gradients, and a running average or a folded copy."""
_MEMORY_SHARE = 0.5


def weight_bytes(spec: SAESpec) -> int:
    """Return the bytes of an SAE's weights, a few vectors more than any architecture has."""
    d_in, d_out = sum(spec.sites.input_widths), sum(spec.sites.output_widths)
    is_transcoder = spec.sites.kind == "transcoder"
    return _FLOAT_BYTES * (spec.d_sae * (d_in + d_out + 5) + d_out + is_transcoder * d_in * d_out)


def training_bytes(spec: SAESpec) -> int:
    """Return the bytes of what a checkpoint holds of an SAE, with counters."""
    return _STATE_COPIES * weight_bytes(spec) + 16 * spec.d_sae


def largest_group_bytes(specs: list[SAESpec]) -> int:
    """Return the bytes of a checkpoint of the SAEs of one site, of the site where they are most."""
    sites = itertools.groupby(specs, key=lambda spec: spec.sites)
    return max(sum(training_bytes(spec) for spec in group) for _, group in sites)


def memory_groups(specs: list[SAESpec], device: torch.device) -> list[list[SAESpec]]:
    """Cut a list of SAEs into groups that take at most half of the free memory each (one SAE at least)."""
    is_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    groups: list[list[SAESpec]] = []
    taken = 0
    for spec in specs:
        size = _WORKING_COPIES * weight_bytes(spec)
        if not groups or taken + size > _MEMORY_SHARE * free:
            groups.append([])
            taken = 0
        groups[-1].append(spec)
        taken += size
    return groups
