"""A task's lens readings as arrays: lens, prompt, depth, position; and the tokens of interest at each position."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from mi_pipe.lenses.depths import hook_at
from mi_pipe.lenses.evaluation import LOGIT, TUNED
from mi_pipe.lenses.final_layers import FinalLayers
from mi_pipe.lenses.readings import Readings, read_lens
from mi_pipe.lenses.residuals import Residuals
from mi_pipe.lenses.translators import Translator

CHOICES = ("next", "answer", "wrong")
NO_TOKEN = -1
Arrays = dict[str, np.ndarray]


def choices_of(
    tokens: Int[Tensor, "pair pos"], answer: Int[Tensor, " pair"], wrong: Int[Tensor, " pair"]
) -> Int[Tensor, "pair pos choice"]:
    """Return the tokens whose probability is read: the right next one, the task's answer, and the wrong one.

    The right next token is the prompt's own, and the answer at the last position.
    """
    following = torch.cat([tokens[:, 1:], answer[:, None]], dim=1)
    wide = [item[:, None].expand_as(tokens) for item in (answer, wrong)]
    return torch.stack([following, *wide], dim=-1)


@torch.no_grad()
def read_chunk(
    final: FinalLayers,
    residuals: Residuals,
    logits: torch.Tensor,
    choices: Int[Tensor, "pair pos choice"],
    translators: dict[int, Translator],
    n_top: int,
) -> Arrays:
    """Return the readings of both lenses at every depth of a batch; the tuned one is NaN where it has no translator."""
    log_p = logits.float().log_softmax(-1)
    by_lens: list[list[Readings | None]] = [[], []]
    for depth, residual in residuals.items():
        by_lens[0].append(read_lens(final.logits(residual), log_p, choices, n_top))
        translator = translators.get(depth)
        tuned = None if translator is None else final.logits(translator(residual))
        by_lens[1].append(None if tuned is None else read_lens(tuned, log_p, choices, n_top))
    lenses = by_lens if translators else by_lens[:1]
    names = asdict(by_lens[0][0]).keys() if by_lens[0][0] else ()
    return {name: np.stack([_stacked(lens, name, by_lens[0]) for lens in lenses]) for name in names}


def _stacked(found: list[Readings | None], name: str, like: list[Readings | None]) -> np.ndarray:
    """Return one figure (pair, depth, pos, …) of all depths; NaN, or -1 for tokens and ranks, where there is none."""
    arrays = []
    for item, other in zip(found, like, strict=True):
        value = getattr(item or other, name).cpu().numpy()
        kind = np.int32 if value.dtype.kind == "i" else np.float32
        missing = NO_TOKEN if kind is np.int32 else np.nan
        arrays.append(value.astype(kind) if item is not None else np.full(value.shape, missing, kind))
    return np.stack(arrays, axis=1)


_DIMS = {"log_prob": ("choice",), "rank": ("choice",), "top_id": ("top",), "top_log_prob": ("top",)}


def task_dataset(
    chunks: list[tuple[Arrays, slice]], prompts: Int[np.ndarray, " prompt"], tokens: list[Tensor], n_depths: int
) -> xr.Dataset:
    """Put the batches of a task together, padded to its longest prompt: NaN, or -1 for numbers that are whole."""
    n_pos = max(len(row) for row in tokens)
    first = chunks[0][0]
    arrays: dict[str, np.ndarray] = {}
    for name, value in first.items():
        n_lenses, _, _, _, *rest = value.shape
        missing = NO_TOKEN if value.dtype.kind == "i" else np.nan
        whole = np.full((n_lenses, len(prompts), n_depths, n_pos, *rest), missing, value.dtype)
        for part, rows in chunks:
            whole[:, rows, :, : part[name].shape[3]] = part[name]
        arrays[name] = whole
    token_id = np.full((len(prompts), n_pos), NO_TOKEN, np.int32)
    for row, ids in zip(token_id, tokens, strict=True):
        row[: len(ids)] = ids.numpy()
    dims = ("lens", "prompt", "depth", "pos")
    variables = {name: ((*dims, *_DIMS.get(name, ())), value) for name, value in arrays.items()}
    dataset = xr.Dataset({**variables, "token_id": (("prompt", "pos"), token_id)})
    lenses = _words([LOGIT, TUNED][: first["kl"].shape[0]])
    coordinates = {"lens": lenses, "prompt": prompts.astype(np.int32), "depth": np.arange(n_depths, dtype=np.int32)}
    named = {"pos": np.arange(n_pos, dtype=np.int32), "choice": _words(CHOICES)}
    hooks = ("depth", _words([hook_at(depth) for depth in range(n_depths)]))
    return dataset.assign_coords({**coordinates, **named, "hook": hooks})


def _words(texts: Sequence[str]) -> np.ndarray:
    """Return texts as objects, which are stored as Zarr's `string`; its texts of fixed length have no v3 standard."""
    return np.array(texts, dtype=object)
