"""Dataset maximisation: the tokens at which a neuron, head, direction or feature is largest.

    dataset_maximisation(acts, Neuron("blocks.9.hook_resid_post", 17), k=20)
    model_maximisation(model, prompts, [Neuron("blocks.9.mlp.hook_post", n) for n in range(8)])

The first reads a store block by block, the second runs a model on prompts where the hook point is not stored, up to the
last hook point that is asked for. Both give exactly the head of a full sort; targets of one hook point share one pass,
and held are a block (a batch) and k rows a target.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.maximisation.contexts import context_of_row, context_of_token
from mi_pipe.maximisation.strongest import Strongest
from mi_pipe.maximisation.targets import Target
from mi_pipe.models.model import Model
from mi_pipe.prompts.prompt_set import PromptSet

_BLOCK_ROWS = 4096
_BATCH_TOKENS = 1024
_COLUMNS = ["target", "rank", "value", "row", "prompt_idx", "pos", "token_id", "token", "context"]


def dataset_maximisation(
    store: ActivationStore,
    targets: Target | Sequence[Target],
    *,
    k: int = 20,
    where: str | None = None,
    with_massive: bool = False,
    one_per_prompt: bool = False,
    before: int = 12,
    after: int = 4,
) -> pd.DataFrame:
    """Return the `k` rows of a store at which each target is largest, strongest first.

    Columns: target, rank (from 0), value, row, prompt_idx, pos, token_id, token and context (the tokens around that
    have rows, the row's own in guillemets). `where` picks among the rows; massive rows, which SAEs never see and at
    which everything is large, are left out unless `with_massive`. Raises ConfigError or HookPointError for what the
    store does not have.
    """
    found: list[tuple[Target, Strongest]] = []
    for hook, group in _by_hook(targets, k):
        of_hook = [(target, Strongest(k, store.prompt_idx if one_per_prompt else None)) for target in group]
        for target, _ in of_hook:
            target.check(store.width(hook))
        left_out = np.zeros(store.n_rows, bool) if with_massive else store.massive(hook)
        for block in store.blocks(hook, _BLOCK_ROWS, where):
            kept = ~left_out[block.rows]
            _look(of_hook, block.rows[kept], block.values[kept])
        found += of_hook
    frames = [_store_lines(store, target, best, before, after) for target, best in found]
    return pd.concat(frames, ignore_index=True)


def model_maximisation(
    model: Model,
    prompts: PromptSet,
    targets: Target | Sequence[Target],
    *,
    k: int = 20,
    first_pos: int = 1,
    one_per_prompt: bool = False,
    before: int = 12,
    after: int = 4,
) -> pd.DataFrame:
    """Return the same by running `model` on `prompts`; `row` is the token's number among all tokens of the prompts.

    Positions before `first_pos` are not looked at (by default the first, at which models make an attention sink: there
    are no statistics that would tell massive rows). Raises as `dataset_maximisation` does.
    """
    prompt_of_token = np.repeat(np.arange(prompts.n_prompts), np.diff(prompts.offsets))
    found = [
        (target, Strongest(k, prompt_of_token if one_per_prompt else None))
        for _, group in _by_hook(targets, k)
        for target in group
    ]
    hooks = list(dict.fromkeys(target.hook for target, _ in found))
    for target, _ in found:
        target.check(model.hooks[target.hook].width)
    forward = ForwardPass(model, hooks, "float32", "float32")
    for tokens, rows, kept in _batches(prompts, first_pos):
        values = forward.exact(tokens, kept)
        for hook in hooks:
            _look([(target, best) for target, best in found if target.hook == hook], rows, values[hook])
    return pd.concat(
        [_prompt_lines(prompts, prompt_of_token, target, best, before, after) for target, best in found],
        ignore_index=True,
    )


def _by_hook(targets: Target | Sequence[Target], k: int) -> list[tuple[str, list[Target]]]:
    if k < 1:
        raise ConfigError(f"k is {k}; at least one row has to be asked for.")
    several = list(targets) if isinstance(targets, Sequence) else [targets]
    if not several:
        raise ConfigError("There is nothing to maximise; give at least one target.")
    names = [target.name for target in several]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"Several targets are called {twice[0]!r}: give them names of their own, or ask one by one.")
    hooks = list(dict.fromkeys(target.hook for target in several))
    ordered = sorted(several, key=lambda target: hooks.index(target.hook))
    return [(hook, list(group)) for hook, group in groupby(ordered, key=lambda target: target.hook)]


@torch.no_grad()
def _look(
    targets: list[tuple[Target, Strongest]], rows: Int[np.ndarray, " row"], values: Float[np.ndarray, "row width"]
) -> None:
    x = torch.from_numpy(values)
    for target, best in targets if len(rows) else ():
        best.add(rows, target.values(x).cpu().numpy())


def _batches(
    prompts: PromptSet, first_pos: int
) -> Iterator[tuple[Int[np.ndarray, "batch pos"], Int[np.ndarray, " row"], Bool[np.ndarray, "batch pos"]]]:
    """Yield prompts of like length, padded at the right; the numbers of their tokens; and which are looked at."""
    lengths = np.diff(prompts.offsets)
    order = np.argsort(lengths, kind="stable")
    # Sorted by length, so a batch is as wide as its last prompt.
    n_batch_prompts = np.maximum(1, _BATCH_TOKENS // np.maximum(lengths[order], 1))
    start = 0
    while start < len(order):
        fits = n_batch_prompts[start:] >= np.arange(1, len(order) - start + 1)
        chosen = order[start : start + max(1, int(fits.argmin()) if not fits.all() else len(fits))]
        pos = np.arange(int(lengths[chosen].max()))
        kept = (pos < lengths[chosen][:, None]) & (pos >= first_pos)
        place = np.minimum(prompts.offsets[chosen][:, None] + pos, prompts.offsets[-1] - 1)
        if kept.any():
            yield prompts.token_ids[place], place[kept], kept
        start += len(chosen)


def _store_lines(store: ActivationStore, target: Target, best: Strongest, before: int, after: int) -> pd.DataFrame:
    order = np.argsort(best.rows)
    table = store.token_table.take(best.rows[order], ["prompt_idx", "pos", "token_id", "text"])
    table = table.iloc[np.argsort(order)].reset_index(drop=True).rename(columns={"text": "token"})
    table["context"] = [context_of_row(store, int(row), before, after) for row in best.rows]
    return _with_values(table, target, best)


def _prompt_lines(
    prompts: PromptSet,
    prompt_of_token: Int[np.ndarray, " token"],
    target: Target,
    best: Strongest,
    before: int,
    after: int,
) -> pd.DataFrame:
    prompt = prompt_of_token[best.rows]
    pos = best.rows - prompts.offsets[prompt]
    places = list(zip(prompt.tolist(), pos.tolist(), strict=True))
    table = pd.DataFrame(
        {
            "prompt_idx": prompt,
            "pos": pos,
            "token_id": prompts.token_ids[best.rows],
            "token": [prompts.texts(i)[at] for i, at in places],
            "context": [context_of_token(prompts, i, at, before, after) for i, at in places],
        }
    )
    return _with_values(table, target, best)


def _with_values(table: pd.DataFrame, target: Target, best: Strongest) -> pd.DataFrame:
    known = {"target": target.name, "rank": np.arange(len(best.rows)), "value": best.values, "row": best.rows}
    return table.assign(token=table["token"].astype(str), **known).reindex(columns=_COLUMNS)
