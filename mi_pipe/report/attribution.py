"""The page of attribution: estimated effects by layer and head or position, exact figures beside the top, and paths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.attribution.attributions import Attributions
from mi_pipe.attribution.nodes import BY_HEAD
from mi_pipe.report.figures import Figure, scatter
from mi_pipe.report.heatmaps import heatmap
from mi_pipe.report.html import slug
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page

_N_TOP = 20
_BY_POS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_TITLES = {
    "z": "Output of each head", "q": "Queries of each head", "k": "Keys of each key/value head",
    "v": "Values of each key/value head", "resid_pre": "Residual stream before each layer",
    "resid_mid": "Residual stream between attention and MLP", "resid_post": "Residual stream after each layer",
    "attn_out": "Attention output", "mlp_out": "MLP output",
}  # fmt: skip
_VERIFIED = {
    "node": "node", "rank": "rank", "mean": "estimate", "exact_mean": "exact", "mean_abs": "estimate, absolute",
    "exact_mean_abs": "exact, absolute", "pair_correlation": "correlation over pairs",
}  # fmt: skip


def page(artifacts: Sequence[Attributions]) -> Page:
    """Make the page of one or more attributed tasks."""
    return Page.of_sections(map(_section, artifacts))


def _section(found: Attributions) -> tuple[dict[str, Any], list[Figure], dict[str, pd.DataFrame]]:
    stem, verified, paths = slug(found.id), found.verified(), found.paths()
    heads = [_heads(found, kind, stem) for kind in BY_HEAD if kind in found.kinds]
    positions = [_positions(found, kind, stem) for kind in _BY_POS if kind in found.kinds]
    checks = [_check(verified, stem)] if len(verified) else []
    sent = [_paths(rows, f"paths{number}-{stem}") for number, rows in _by_path(paths)]
    section = {
        "name": name_of(found),
        "id": found.id,
        "slug": stem,
        "how": found.to_xarray().attrs,
        "summary": found.summary,
        "heads": [figure.name for figure in heads],
        "positions": [figure.name for figure in positions],
        "n_pos": _commonest_length(found),
        "checks": [figure.name for figure in checks],
        "verified": _shown(verified) if len(verified) else verified,
        "paths": [figure.name for figure in sent],
        "top": found.nodes().nlargest(_N_TOP, "mean_abs")[["node", "mean", "standard_error", "mean_abs", "rank"]],
    }
    tables = {f"nodes-{stem}": found.nodes()}
    tables |= {f"verified-{stem}": verified} if len(verified) else {}
    tables |= {f"paths-{stem}": paths} if len(paths) else {}
    return section, [*heads, *checks, *sent, *positions], tables


def _shown(verified: pd.DataFrame) -> pd.DataFrame:
    largest = verified.sort_values("exact_mean_abs", ascending=False).head(_N_TOP)
    return largest.loc[:, list(_VERIFIED)].set_axis(list(_VERIFIED.values()), axis=1)


def _commonest_length(found: Attributions) -> int:
    return int(found.pairs["n_pos"].mode().iloc[0])


def _heads(found: Attributions, kind: str, stem: str) -> Figure:
    values = found.fraction(kind).to_numpy()
    title = f"{_TITLES[kind]}, all positions"
    return _drawn(f"{kind}-{stem}", title, values, [str(head) for head in range(values.shape[1])], "head", found)


def _positions(found: Attributions, kind: str, stem: str) -> Figure:
    """Draw a kind by layer and position, over the pairs of the commonest length."""
    n_pos = _commonest_length(found)
    chosen = found.pairs.loc[found.pairs["n_pos"] == n_pos]
    effects = found.effects(kind).sel(pair=chosen["pair"].to_numpy()).isel(pos=slice(n_pos)).mean("pair")
    difference = float((chosen["clean"] - chosen["corrupted"]).mean())
    sign = 1 if found.direction == "denoising" else -1
    values = effects.to_numpy() / (sign * difference)
    return _drawn(f"{kind}-{stem}", _TITLES[kind], values, list(chosen["labels"].iloc[0]), "token", found)


def _drawn(
    name: str, title: str, values: np.ndarray, columns: Sequence[str], column_title: str, found: Attributions
) -> Figure:
    place = np.unravel_index(int(np.nan_to_num(np.abs(values), nan=-1.0).argmax()), values.shape)
    leader = f"the largest is {values[place]:.3f} at layer {place[0]}, {columns[int(place[1])]!r}"
    return heatmap(
        name, title, f"Heatmap of {found.method} as a fraction of the difference of the runs, {title}; {leader}.",
        values, [str(layer) for layer in range(len(values))], columns, row_title="layer", column_title=column_title,
        value_title="estimated fraction", diverging=True,
    )  # fmt: skip


def _check(verified: pd.DataFrame, stem: str) -> Figure:
    return scatter(
        f"exact-{stem}",
        "Estimated and exact effects",
        f"Scatter of estimated against exact mean effects of {len(verified)} nodes.",
        verified.rename(columns={"mean": "estimate", "exact_mean": "exact"}),
        "exact",
        "estimate",
        "kind",
        x_title="exact mean effect",
        y_title="estimated mean effect",
    )


def _by_path(paths: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    return [(int(str(number)), rows) for number, rows in paths.groupby("path")] if len(paths) else []


def _paths(rows: pd.DataFrame, name: str) -> Figure:
    """Draw a path's mean effects by layer and sender; MLPs and the embedding have columns of their own."""
    column = np.where(rows["kind"] == "head", rows["head"].astype(str), rows["kind"])
    table = pd.pivot_table(rows.assign(column=column), index="layer", columns="column", values="effect")
    order = sorted(
        map(str, table.columns), key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label)
    )
    receivers, mlps = (str(rows[name].to_numpy()[0]) for name in ("receivers", "mlps"))
    title = f"Paths into {receivers.replace(' ', ', ')}; MLPs {mlps}"
    values = table.loc[:, order].to_numpy(float)
    return heatmap(
        name, title, f"Heatmap of the mean effect of patching each sender's paths into {receivers}.",
        values, [str(layer) for layer in table.index], order, row_title="layer", column_title="sender",
        value_title="change of the metric", diverging=True,
    )  # fmt: skip
