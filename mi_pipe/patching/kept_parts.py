"""The patched block without what it need not run again: its attention's output is known, and so may be its MLP's.

What a patch at z, at the attention's output, at the MLP's neurons or its output writes is the base run's output plus a
difference that goes through one linear map. The block is then called with its own modules for attention (and MLP)
returning that, so that everything around them (norms after them, parallel branches) stays the model's own.
A patch of the residual stream between attention and MLP enters the block, whose attention adds nothing (between.py says
why). Where one position alone is patched, the block is called on that one alone.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_pipe.patching.between import is_between
from mi_pipe.patching.block_calls import BlockCalls
from mi_pipe.patching.block_parts import inputs_first
from mi_pipe.patching.patches import Patches, Read, edited_hook
from mi_pipe.patching.runs import PairRuns

_Z, _NEURON, _MID = "attn.hook_z", "mlp.hook_post", "hook_resid_mid"
_ATTN, _MLP, _ATTN_END, _MLP_END = "attn.hook_out", "mlp.hook_out", "hook_attn_out", "hook_mlp_out"
_ROWS_CHECKED = 2


def checked_pairs(runs: PairRuns) -> Int[Tensor, " row"]:
    """Return the pairs of a batch on which shortcuts are compared with the model's own numbers.

    A single pair is there twice: arguments that were captured from one row may fit one row alone.
    """
    return torch.arange(_ROWS_CHECKED, device=runs.tokens.device) % runs.n_pairs


class KeptParts:
    """Runs patched blocks on the stored parts of the base run."""

    def __init__(self, calls: BlockCalls, runs: PairRuns) -> None:
        """Use the parts that `runs` has kept."""
        self.calls = calls
        self.runs = runs

    def knows(self, hook: str) -> bool:
        """Say whether patches at a hook point can be run so: what is needed of the base run was kept."""
        layer, name = _split(hook)
        needed = {
            _Z: [_Z, _ATTN], _ATTN: [_ATTN], _ATTN_END: [_ATTN, _ATTN_END], _MID: [_MID, _ATTN],
            _NEURON: [_NEURON, _ATTN, _MLP], _MLP_END: [_MLP_END, _ATTN, _MLP],
        }.get(name)  # fmt: skip
        return needed is not None and all(f"blocks.{layer}.{part}" in self.runs.base for part in needed)

    def after(self, patches: Patches, layer: int, first_pos: int) -> Float[Tensor, "row pos d_model"]:
        """Return what leaves the patched block, from position `first_pos` on.

        Of the last block only the last position is run, if all are patched.
        """
        runs, pair = self.runs, patches.pair
        is_last = layer == len(self.calls) - 1
        if patches.pos is None and not is_last:
            return self._block(patches, layer, lambda value: value[pair, first_pos:])
        at = torch.full_like(pair, runs.n_pos - 1) if patches.pos is None else patches.pos
        found = self._block(patches, layer, lambda value: value[pair, at][:, None])
        if patches.pos is None:
            return found
        hidden = runs.residuals[layer + 1][pair, first_pos:].clone()
        hidden[torch.arange(len(pair), device=pair.device), at - first_pos] = found[:, 0]
        return hidden

    def largest_error(self, only_between: bool = False) -> float:
        """Return the largest relative error of blocks run on their own kept parts, and of the projections' maps."""
        hooks = {edited_hook(hook) for hook in self.runs.donors}
        wanted = [hook for hook in hooks if self.knows(hook) and (is_between(hook) or not only_between)]
        return max(map(self._error, wanted), default=0.0)

    def _block(self, patches: Patches, layer: int, read: Read) -> Tensor:
        """Call the patched block at the positions that `read` reads, all of which are patched."""
        name, base, parts = _split(patches.edited_hook)[1], self._base(layer), self.calls.parts[layer]
        hidden = read(self.runs.residuals[layer])
        donor = patches.donor(self.runs, read)
        outputs: dict[nn.Module, Tensor] = {_module(parts.attention): read(base(_ATTN))}
        if name in (_Z, _NEURON):
            change = self._written(patches, layer, donor - read(base(name)))
            end, output = (parts.attention, _ATTN) if name == _Z else (parts.mlp, _MLP)
            outputs[_module(end)] = read(base(output)) + change
            return self.calls.call(layer, hidden, outputs=outputs)
        if name == _MID:
            return self._from_between(layer, donor)
        if name == _MLP_END:
            outputs[_module(parts.mlp)] = read(base(_MLP))
        outputs[_module({_ATTN: parts.attention, _ATTN_END: parts.attention_end, _MLP_END: parts.mlp_end}[name])] = (
            donor
        )
        return self.calls.call(layer, hidden, outputs=outputs)

    def _written(
        self, patches: Patches, layer: int, change: Float[Tensor, "row few width"]
    ) -> Float[Tensor, "row few d_model"]:
        """Return what a change of z or of neurons adds to the attention's or MLP's output, of each row's part alone."""
        weight = inputs_first(self._projection(patches.edited_hook, layer))
        if patches.part is None:
            return change @ weight
        columns = patches.columns()
        change = change.gather(2, columns[:, None].expand(-1, change.shape[1], -1))
        if patches.part_width == 1:
            return change * weight[columns[:, 0]][:, None]
        out = change.new_empty(*change.shape[:2], weight.shape[1])
        by_part = rearrange(weight, "(part width) d -> part width d", width=patches.part_width)
        for part in patches.part.unique().tolist():
            rows = patches.part == part
            out[rows] = change[rows] @ by_part[part]
        return out

    def _from_between(self, layer: int, between: Float[Tensor, "row few d_model"]) -> Float[Tensor, "row few d_model"]:
        """Call a block on what its MLP is to read and its residual stream to carry past the MLP."""
        parts, nothing = self.calls.parts[layer], torch.zeros_like(between)
        ends = [_module(parts.attention), *([parts.attention_end] if parts.attention_end is not None else [])]
        return self.calls.call(layer, between, outputs=dict.fromkeys(ends, nothing))

    def _error(self, hook: str) -> float:
        """Compare a block on its own kept parts with the base run, all positions together and the last alone."""
        layer, name = _split(hook)
        pairs, parts, base = checked_pairs(self.runs), self.calls.parts[layer], self._base(layer)
        enters, leaves = (residual[pairs] for residual in self.runs.residuals[layer : layer + 2])
        kept = {_module(parts.attention): base(_ATTN)[pairs]}
        if name in (_NEURON, _MLP_END):
            kept[_module(parts.mlp)] = base(_MLP)[pairs]
        errors = []
        for at in (slice(None), slice(-1, None)):
            if name == _MID:
                found = self._from_between(layer, base(_MID)[pairs][:, at])
            else:
                outputs = {module: value[:, at] for module, value in kept.items()}
                found = self.calls.call(layer, enters[:, at], outputs=outputs)
            errors.append(_relative(found, leaves[:, at]))
        if name in (_Z, _NEURON):
            projection = self._projection(hook, layer)
            bias = getattr(projection, "bias", None)
            found = base(name)[pairs] @ inputs_first(projection)
            found = found if bias is None else found + bias
            errors.append(_relative(found, base(_ATTN if name == _Z else _MLP)[pairs]))
        return max(errors)

    def _base(self, layer: int) -> Callable[[str], Tensor]:
        return lambda name: self.runs.base[f"blocks.{layer}.{name}"]

    def _projection(self, hook: str, layer: int) -> nn.Module:
        parts = self.calls.parts[layer]
        return _module(parts.projection if _split(hook)[1] == _Z else parts.down_projection)


def _split(hook: str) -> tuple[int, str]:
    _, layer, name = hook.split(".", 2)
    return int(layer), name


def _module(module: nn.Module | None) -> nn.Module:
    assert module is not None, "its output was kept, so it is there"
    return module


def _relative(found: Tensor, wanted: Tensor) -> float:
    error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
    return float(error.nan_to_num(nan=torch.inf))
