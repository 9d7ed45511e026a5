"""Runs in which something is moved at a hook point, and the blocks before it are left out: what these return is known.

Steps:
1. while the model runs as it is, keep what the last block before each hook point returns;
2. with an edit at the hook point, let the blocks up to there return just that, without computing anything. The model
   itself goes on from there with its own masks, later blocks and unembedding: the numbers are those of a whole run.

Exact where blocks talk to each other through the hidden states alone. Whether they do is tried on the first prompt; in
a model where they do not (keys and values shared between layers), whole runs are made. Hook points outside the blocks:
before them nothing is left out, after them all blocks are.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.hook_points import layer_of
from mi_pipe.models.model import Model
from mi_pipe.patching.edits import forced
from mi_pipe.patching.engine import CANNOT_RUN, TOLERANCE

_log = logging.getLogger(__name__)
_AFTER_BLOCKS = ("ln_final.", "unembed.", "hook_unembed")

Run = Callable[[Int[Tensor, "row pos"]], Tensor]


class KnownBlocks:
    """What a model's first blocks return on some prompts of one length."""

    def __init__(self, model: Model, hooks: Sequence[str]) -> None:
        """Know nothing yet; `hooks` are those at which values will be moved."""
        self._model = model
        self._n_before = {hook: n_before(model, hook) for hook in hooks}
        self._hidden: dict[int, Float[Tensor, "prompt pos d_model"]] = {}
        self._n_returned: dict[int, int] = {}

    def base(self, run: Run, tokens: Int[Tensor, "prompt pos"], n_rows: int) -> Tensor:
        """Return what `run` gives for all prompts, `n_rows` at a time, with the model as it is."""
        kept: dict[int, list[Tensor]] = {n: [] for n in self._n_before.values() if n}
        with ExitStack() as stack:
            for n, outputs in kept.items():
                handle = self._model.blocks[n - 1].register_forward_hook(partial(self._keep, n, outputs))
                stack.callback(handle.remove)
            values = torch.cat([run(some) for some in tokens.split(max(1, n_rows))])
        self._hidden = {n: torch.cat(outputs) for n, outputs in kept.items()}
        if not all(self._stands_alone(hook, run, tokens[:1], values[:1]) for hook in self._n_before):
            _log.info("%s is run whole: its blocks share more than hidden states", self._model.info.architecture)
            self._n_before = dict.fromkeys(self._n_before, 0)
        return values

    @contextmanager
    def left_out(self, hook: str, rows: Int[Tensor, " row"]) -> Generator[None]:
        """Within the block, a run of the prompts `rows` computes none of the blocks before a hook point."""
        n = self._n_before[hook]
        hidden = self._hidden[n][rows] if n else None
        returned = (hidden, *[None] * (self._n_returned[n] - 1)) if n and self._n_returned[n] else hidden
        with forced(dict.fromkeys(self._model.blocks[:n], returned)):
            yield

    def _stands_alone(self, hook: str, run: Run, tokens: Int[Tensor, "one pos"], value: Tensor) -> bool:
        """Say whether leaving blocks out changes nothing on one prompt."""
        try:
            with self.left_out(hook, torch.zeros(1, dtype=torch.long, device=tokens.device)):
                again = run(tokens)
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN:
            return False
        return bool((again - value).abs().max() <= TOLERANCE[self._model.dtype] * value.abs().max())

    def _keep(self, n: int, outputs: list[Tensor], _block: Any, _args: Any, output: Any) -> None:
        self._n_returned[n] = len(output) if isinstance(output, tuple) else 0
        outputs.append(output[0] if isinstance(output, tuple) else output)


def n_before(model: Model, hook: str) -> int:
    """Return how many of the first blocks return the same whatever is added at a hook point.

    A block counts whose own output is the hook point: what is added, is added to what it returns.
    """
    layer = layer_of(hook)
    if layer is None:
        return model.info.n_layers if hook.startswith(_AFTER_BLOCKS) else 0
    return layer + hook.endswith(".hook_resid_post")
