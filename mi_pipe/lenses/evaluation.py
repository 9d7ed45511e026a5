"""How well each lens says what the model will say, on held-out rows of a store: sums by prompt, means, intervals."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.bootstrap import ratio_interval
from mi_pipe.lenses.depths import hook_at
from mi_pipe.lenses.final_layers import FinalLayers
from mi_pipe.lenses.readings import kl_divergence
from mi_pipe.lenses.translators import Translator
from mi_pipe.lenses.tuning import CHUNK_ENTRIES
from mi_pipe.lenses.tuning_rows import NO_TOKEN, RowBatch

LOGIT, TUNED, MODEL = "logit", "tuned", "model"
_FIGURES = ("kl", "top_agreement", "entropy", "n_rows", "cross_entropy", "n_next")
_KEYS = ["lens", "depth", "prompt_idx"]
_MEAN_OVER = {"kl": "n_rows", "top_agreement": "n_rows", "entropy": "n_rows", "cross_entropy": "n_next"}


@torch.no_grad()
def row_sums(final: FinalLayers, batch: RowBatch, translators: dict[int, Translator]) -> pd.DataFrame:
    """Return, for each lens, depth and prompt of a batch, sums of its figures over the prompt's rows (float64).

    Rows: lens ("logit", "tuned", and "model" for the final distribution itself, at depth -1), depth, prompt_idx.
    """
    size = max(1, CHUNK_ENTRIES // final.d_vocab)
    parts = []
    for start in range(0, len(batch.rows), size):
        part = slice(start, start + size)
        p = final.logits(batch.last[part]).float().log_softmax(-1)
        keys = {"prompt_idx": batch.prompt_idx[part]}
        parts.append(pd.DataFrame({"lens": MODEL, "depth": -1, **keys, **_figures(p, p, batch.next_id[part])}))
        for depth, translator in translators.items():
            residual = batch.residuals[depth][part]
            for lens, value in ((LOGIT, residual), (TUNED, translator(residual))):
                q = final.logits(value).float().log_softmax(-1)
                parts.append(
                    pd.DataFrame({"lens": lens, "depth": depth, **keys, **_figures(p, q, batch.next_id[part])})
                )
    return _sums(parts, _KEYS)


def _figures(
    p: Float[Tensor, "row d_vocab"], q: Float[Tensor, "row d_vocab"], next_id: Tensor
) -> dict[str, Float[np.ndarray, " row"]]:
    known = next_id != NO_TOKEN
    loss = -q.gather(1, next_id.clamp(min=0)[:, None]).squeeze(1)
    figures = {
        "kl": kl_divergence(p, q),
        "top_agreement": p.argmax(-1) == q.argmax(-1),
        "entropy": -(q.exp() * q).sum(-1),
        "n_rows": torch.ones_like(loss),
        "cross_entropy": torch.where(known, loss, torch.zeros_like(loss)),
        "n_next": known,
    }
    return {name: value.double().cpu().numpy() for name, value in figures.items()}


def evaluation_table(sums: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return one row a lens and depth: means over all rows, and 95% intervals by drawing prompts.

    `cross_entropy` (of the next token, NaN where the store never says it) and the others in nats; `top_agreement` is
    the share of rows whose likeliest token is the model's.
    """
    whole = _sums(sums, _KEYS)
    rows = []
    for key, prompts in whole.groupby(["lens", "depth"], sort=True):
        lens, depth = str(key[0]), int(str(key[1]))  # pyright: ignore[reportIndexIssue]
        found: dict[str, object] = {"lens": lens, "depth": depth, "hook": "" if lens == MODEL else hook_at(depth)}
        for name, count in _MEAN_OVER.items():
            total, n = prompts[name].to_numpy(float), prompts[count].to_numpy(float)
            found[name] = total.sum() / n.sum() if n.sum() else np.nan
            found[f"{name}_low"], found[f"{name}_high"] = ratio_interval(total, n)
        rows.append({**found, "n_rows": int(prompts["n_rows"].to_numpy().sum()), "n_prompts": len(prompts)})
    return pd.DataFrame(rows).astype({"depth": "int32"})


def _sums(parts: Iterable[pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    whole: Any = pd.concat(parts)
    return whole.groupby(keys, as_index=False)[list(_FIGURES)].sum()
