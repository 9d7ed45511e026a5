"""Curves of SAE training: what the training measured of itself, and what held-out rows said at some moments of it."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from mi_pipe.report.figures import Figure, lines

QUALITY = {
    "fvu": ("Fraction of variance unexplained", "FVU", True),
    "l0": ("Active features a row", "L0", False),
    "dead_fraction": ("Dead features", "share dead", False),
    "dense_fraction": ("Dense features (on more than a tenth of the rows)", "share dense", False),
}
LOSS = {
    "loss": ("Training loss", "loss", True),
    "reconstruction": ("Loss: reconstruction", "reconstruction", True),
    "sparsity": ("Loss: sparsity penalty", "sparsity", False),
    "gate": ("Loss: reconstruction by the gate alone", "gate", True),
    "auxk": ("Loss: dead features on the others' error (AuxK)", "AuxK", False),
    "revival": ("Loss: thresholds of dead features", "thresholds", False),
}
OPTIMISATION = {
    "grad_norm": ("Norm of the gradient, before clipping", "gradient norm", True),
    "lr": ("Learning rate", "learning rate", False),
    "coefficient": ("Coefficient of the sparsity penalty", "coefficient", True),
    "threshold": ("Threshold of the batch's selection", "threshold", False),
}
HELD_OUT = {
    "fvu": ("Held-out FVU", "FVU", True),
    "l0": ("Held-out L0", "L0", False),
    "ce_recovered": ("Held-out cross-entropy recovered", "CE recovered", False),
    "kl": ("Held-out KL", "KL, nats a token", True),
}
"""Column to (title, title of the axis, whether values are shown on a logarithmic scale)."""
_MAX_POINTS = 400
_BIN_WIDTH = 0.25
_ALL = "all SAEs"


def curves(
    table: pd.DataFrame, columns: Mapping[str, tuple[str, str, bool]], family: Mapping[str, str], prefix: str = ""
) -> list[Figure]:
    """Return a figure of each column that has values other than 0, over training tokens, a line an SAE."""
    shown = (name for name in columns if name in table and len(table))
    return [figure for name in shown if (figure := _curve(table, name, columns[name], family, prefix)) is not None]


def _curve(
    table: pd.DataFrame, column: str, titles: tuple[str, str, bool], family: Mapping[str, str], prefix: str
) -> Figure | None:
    title, y_title, is_log = titles
    values = table[column].to_numpy(float)
    if not np.nan_to_num(values).any():
        return None
    known = table.loc[np.isfinite(values), ["sae", "tokens", column]]
    ends = np.array([rows[column].iloc[-1] for _, rows in known.groupby("sae", sort=False, observed=True)])
    drawn = pd.concat([_thin(rows) for _, rows in _alike(known, column).groupby("sae", sort=False, observed=True)])
    least = drawn[column].to_numpy(float).min()
    return lines(
        prefix + column.replace("_", "-"),
        title,
        f"Line chart of {y_title} against training tokens for {len(ends)} SAEs; "
        f"the last values lie between {ends.min():.3g} and {ends.max():.3g}.",
        drawn,
        "tokens",
        column,
        by="sae",
        x_title="training tokens",
        y_title=y_title,
        from_zero=not is_log and least >= 0,
        log_y=is_log and least > 0,
        markers=bool(prefix),
        families=family,
    )


def _alike(known: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return one SAE's rows for all where they are the same for all, as learning rates mostly are."""
    groups = [rows[["tokens", column]].to_numpy() for _, rows in known.groupby("sae", sort=False, observed=True)]
    if len(groups) > 1 and all(np.array_equal(groups[0], rows) for rows in groups[1:]):
        return pd.DataFrame(groups[0], columns=["tokens", column]).assign(sae=_ALL)
    return known


def densities(table: pd.DataFrame, family: Mapping[str, str]) -> list[Figure]:
    """Return the histogram of feature densities at the last moment of each SAE, a line an SAE."""
    if table.empty:
        return []
    names, steps = table["sae"].to_numpy(str), table["step"].to_numpy(int)
    logs, counts = table["log10_density"].to_numpy(float), table["n_features"].to_numpy(int)
    ends = {name: steps[names == name].max() for name in dict.fromkeys(names.tolist())}
    is_last = steps == np.array([ends[name] for name in names.tolist()])
    silent, shown = counts[is_last & np.isnan(logs)], is_last & ~np.isnan(logs)
    frame = pd.DataFrame({"sae": names[shown], "log10_density": logs[shown] + _BIN_WIDTH / 2})
    least, most = int(silent.min()), int(silent.max())
    never = f"{least:,}{f' to {most:,}' if most > least else ''} features of an SAE never fire on these rows"
    return [
        lines(
            "held-out-density",
            "How often features fire, at the end",
            f"Histogram of the base-10 logarithm of feature density on held-out rows for {len(ends)} SAEs; {never}.",
            frame.assign(n_features=counts[shown]),
            "log10_density",
            "n_features",
            by="sae",
            x_title="log10 density (share of held-out rows on which a feature fires)",
            y_title="features",
            from_zero=True,
            caption=f"Bins of {_BIN_WIDTH}; left out: {never}.",
            families=family,
        )
    ]


def _thin(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep at most `_MAX_POINTS` evenly spaced rows, the last always."""
    step = -(-len(rows) // _MAX_POINTS)
    return rows.iloc[::-1].iloc[::step].iloc[::-1]
