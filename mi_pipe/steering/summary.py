"""From values prompt by prompt to means with bootstrap intervals, and to the main figures of a run.

Prompts are drawn with replacement, all directions and coefficients from the same draws. The mean loss is over tokens:
sum of n_tokens · loss over sum of n_tokens of the drawn prompts.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from mi_pipe.core.manifest import Scalar
from mi_pipe.patching.statistics import Resampling, bootstrap_weights, percentile_interval

_ROW = ("direction", "coefficient")


def effect_table(dataset: xr.Dataset, measure: str) -> pd.DataFrame:
    """Return one row a direction and coefficient: `mean`, `change` from coefficient 0, and an interval of each."""
    name = "loss" if "loss" in dataset else "metric"
    values = dataset[name].to_numpy().astype(np.float64)
    sizes = dataset["n_tokens"].to_numpy().astype(np.float64) if "n_tokens" in dataset else np.ones(values.shape[-1])
    coefficients = dataset["coefficient"].to_numpy()
    base = values[:, np.flatnonzero(coefficients == 0)[0]][:, None]
    columns: dict[str, np.ndarray] = {}
    for prefix, some in (("", values), ("change_", values - base)):
        mean, low, high = _mean_and_interval(some, sizes)
        columns |= {prefix.rstrip("_") or "mean": mean, f"{prefix}low": low, f"{prefix}high": high}
    directions = dataset["direction"].to_numpy()
    rows = {
        "measure": measure,
        "direction": np.repeat(directions, len(coefficients)),
        "coefficient": np.tile(coefficients, len(directions)),
    }
    return pd.DataFrame(rows | {name: column.reshape(-1) for name, column in columns.items()})


def _mean_and_interval(
    values: Float[np.ndarray, "direction coefficient prompt"], sizes: Float[np.ndarray, " prompt"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    how = Resampling()
    weights = bootstrap_weights(len(sizes), how) * sizes
    draws = np.einsum("rp,dcp->rdc", weights, values) / weights.sum(1)[:, None, None]
    low, high = percentile_interval(draws, how.level)
    return values @ sizes / sizes.sum(), low, high


def main_figures(effects: pd.DataFrame, controls: Sequence[str]) -> dict[str, Scalar]:
    """Return the largest change of the first task's metric by a direction that is no control, and what it costs."""
    if effects.empty:
        return {}
    loss = effects.loc[effects["measure"] == "loss"].set_index(list(_ROW))["mean"]
    base = loss[loss.index.get_level_values(1) == 0]
    perplexity: dict[str, Scalar] = {"perplexity": float(np.exp(base.iloc[0]))} if len(loss) else {}
    tasks = effects.loc[(effects["measure"] != "loss") & ~effects["direction"].isin(controls)]
    if tasks.empty:
        return perplexity
    first = tasks.loc[tasks["measure"] == tasks["measure"].iloc[0]]
    strongest = first.loc[first["change"].abs().idxmax()]
    figures: dict[str, Scalar] = {
        "strongest": f"{strongest['direction']} at {strongest['coefficient']:g}",
        "metric": float(first.loc[first["coefficient"] == 0, "mean"].iloc[0]),
        "metric_there": float(strongest["mean"]),
    }
    if len(loss):
        perplexity |= {"perplexity_there": float(np.exp(loss.loc[tuple(strongest[list(_ROW)])]))}
    return figures | perplexity
