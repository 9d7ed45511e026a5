"""The main figures of the stage `lenses`: at which depth the answer is there, and what tuning gains."""

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from mi_pipe.core.manifest import Scalar
from mi_pipe.lenses.evaluation import LOGIT, TUNED


def answer_depths(ranks: Int[np.ndarray, "prompt depth"]) -> Int[np.ndarray, " prompt"]:
    """Return the first depth from which on the answer is the likeliest token to the end; -1 where it ends otherwise.

    >>> answer_depths(np.array([[9, 0, 3, 0, 0], [5, 4, 3, 2, 1]]))
    array([ 3, -1])
    """
    is_top = ranks == 0
    stays = np.cumprod(is_top[:, ::-1], axis=1)[:, ::-1]
    return np.where(is_top[:, -1], ranks.shape[1] - stays.sum(1), -1)


def task_figures(dataset: xr.Dataset, n_pos: Int[np.ndarray, " prompt"]) -> dict[str, Scalar]:
    """Return, for the logit lens at the last position, how often the answer comes out, and the median of its depths."""
    ranks = dataset["rank"].sel(lens=LOGIT, choice="answer").transpose("prompt", "depth", "pos").to_numpy()
    last = np.stack([rows[:, n - 1] for rows, n in zip(ranks, n_pos, strict=True)])
    depths = answer_depths(last)
    found = depths[depths >= 0]
    figures: dict[str, Scalar] = {"answer_share": float((depths >= 0).mean())}
    return figures | ({"answer_depth": float(np.median(found))} if len(found) else {})


def tuned_figures(evaluation: pd.DataFrame) -> dict[str, Scalar]:
    """Return the mean over depths of the held-out KL to the final distribution, of both lenses."""
    means = {lens: float(evaluation.loc[evaluation["lens"] == lens, "kl"].to_numpy().mean()) for lens in (LOGIT, TUNED)}
    return {"kl_logit_lens": means[LOGIT], "kl_tuned_lens": means[TUNED]}
