"""The feature browser: a list of all features, and for many a dashboard that the page loads when it is asked for.

Dashboards lie in chunks of `CHUNK` features, one data script a chunk, so that thousands of features cost the
reader only what is looked at. Which features get one: evenly over the ranks of density, so that the rare and the
frequent are both there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.core.artifact import Artifact
from mi_pipe.report.figures import Figure, histogram, rounded
from mi_pipe.report.html import slug
from mi_pipe.report.page import Page

CHUNK = 50
_N_SEARCHED = 6
_DIGITS = 4


def page(sets: Sequence[Artifact], n_features: int) -> Page:
    """Make the browser of the features of all SAEs in `sets`, with at most `n_features` dashboards an SAE."""
    saes = [
        (artifact, str(name), rows.reset_index(drop=True))
        for artifact in sets
        for name, rows in artifact.read_table("features.parquet").groupby("sae", sort=False, observed=True)
    ]
    tables = [
        {
            "name": name,
            "key": _key(artifact, name),
            "n_features": len(rows),
            "n_dead": int(rows["is_dead"].sum()),
            "chunk": CHUNK,
        }
        for artifact, name, rows in saes
    ]
    figures = [] if not saes else [_densities(saes), _maxima(saes)]
    return Page(
        context={"saes": tables, "n_dashboards": n_features, "figures": [figure.name for figure in figures]},
        figures=figures,
        tables={f"features-{slug(name)}": rows for _, name, rows in saes},
        scripts=_scripts(sets, n_features),
    )


def chosen(rows: pd.DataFrame, n_features: int) -> np.ndarray:
    """Return the numbers of the features that get a dashboard, ascending; dead features get none."""
    alive = rows[~rows["is_dead"]].sort_values(["density", "feature"], kind="stable")["feature"].to_numpy()
    if len(alive) > n_features:
        alive = alive[np.linspace(0, len(alive) - 1, n_features).round().astype(int)]
    return np.sort(alive)


def _key(artifact: Artifact, sae: str) -> str:
    return f"features/{slug(artifact.id)}/{slug(sae)}"


def _scripts(sets: Sequence[Artifact], n_features: int) -> Iterator[tuple[str, Any]]:
    """Yield for each SAE its list and then its chunks, one set's tables in memory at a time."""
    for artifact in sets:
        tables = {
            name: dict(list(artifact.read_table(f"{name}.parquet").groupby("sae", sort=False, observed=True)))
            for name in ("features", "examples", "logit_effects")
        }
        bins = {name: tensor.numpy() for name, tensor in artifact.read_tensors("histograms.safetensors").items()}
        for sae, rows in tables["features"].items():
            numbers = chosen(rows, n_features)
            examples = _by_feature(tables["examples"].get(sae), numbers)
            effects = _by_feature(tables["logit_effects"].get(sae), numbers)
            yield f"{_key(artifact, str(sae))}/index", _index(rows, numbers, examples, effects)
            for i in range(0, len(numbers), CHUNK):
                part = numbers[i : i + CHUNK]
                yield f"{_key(artifact, str(sae))}/{i // CHUNK}", _chunk(str(sae), part, examples, effects, bins)


def _by_feature(frame: pd.DataFrame | None, numbers: np.ndarray) -> dict[int, pd.DataFrame]:
    if frame is None:
        return {}
    kept = frame[frame["feature"].isin(numbers)]
    return {int(feature): rows for feature, rows in kept.groupby("feature", sort=False)}  # pyright: ignore[reportArgumentType]


def _index(rows: pd.DataFrame, numbers: np.ndarray, examples: dict[int, Any], effects: dict[int, Any]) -> Any:
    """Return the list of features as columns; `place` is a dashboard's number in the chunks, or -1."""
    place = {int(feature): i for i, feature in enumerate(numbers)}
    features = [int(feature) for feature in rows["feature"]]
    return {
        "feature": features,
        "density": rounded(rows["density"].to_numpy(float), _DIGITS),
        "max": rounded(rows["max_activation"].to_numpy(float), _DIGITS),
        "mean": rounded(rows["mean_activation"].to_numpy(float), _DIGITS),
        "dead": rows["is_dead"].astype(int).tolist(),
        "place": [place.get(feature, -1) for feature in features],
        "tokens": [_top_tokens(examples.get(feature)) for feature in features],
        "promoted": [_promoted(effects.get(feature)) for feature in features],
    }


def _top_tokens(examples: pd.DataFrame | None) -> list[str]:
    """Return the distinct tokens on which the feature fires most, strongest first."""
    if examples is None:
        return []
    top = examples[examples["group"] == "top"].sort_values("rank")
    peaks = (row.tokens[row.pos - row.first_pos] for row in top.itertuples())
    return list(dict.fromkeys(peaks))[:_N_SEARCHED]


def _promoted(effects: pd.DataFrame | None) -> list[str]:
    if effects is None:
        return []
    return effects[effects["sign"] == "promoted"].sort_values("rank")["token"].head(_N_SEARCHED).tolist()


def _chunk(
    sae: str, numbers: np.ndarray, examples: dict[int, pd.DataFrame], effects: dict[int, pd.DataFrame], bins: Any
) -> Any:
    """Return the dashboards of some features; tokens are written once and referred to by number."""
    texts: dict[str, int] = {}
    return {
        "dashboards": {
            int(feature): {
                "examples": _examples(examples.get(int(feature)), texts),
                "effects": _effects(effects.get(int(feature))),
                "counts": bins[f"{sae}.counts"][feature].tolist(),
                "edges": rounded(bins[f"{sae}.edges"][feature].astype(float), _DIGITS),
            }
            for feature in numbers
        },
        "tokens": list(texts),
    }


def _examples(rows: pd.DataFrame | None, texts: dict[str, int]) -> list[Any]:
    """Return examples as [group, activation, prompt, first pos, peak, token numbers, firing places, their values]."""
    if rows is None:
        return []
    found = []
    for row in rows.itertuples():
        values = np.asarray(row.activations, dtype=float)
        places = np.flatnonzero(values)
        tokens = [texts.setdefault(str(text), len(texts)) for text in row.tokens]
        head = [str(row.group), *rounded(np.array([row.activation], dtype=float), _DIGITS)]
        place = [int(row.prompt_idx), int(row.first_pos), int(row.pos - row.first_pos)]
        found.append([*head, *place, tokens, places.tolist(), rounded(values[places], _DIGITS)])
    return found


def _effects(rows: pd.DataFrame | None) -> dict[str, list[Any]]:
    if rows is None:
        return {"promoted": [], "suppressed": []}
    return {
        sign: [
            [str(token), *rounded(np.array([effect], dtype=float), _DIGITS)]
            for token, effect in zip(part["token"], part["effect"], strict=True)
        ]
        for sign in ("promoted", "suppressed")
        if (part := rows[rows["sign"] == sign].sort_values("rank")) is not None
    }


def _densities(saes: Sequence[tuple[Artifact, str, pd.DataFrame]]) -> Figure:
    values = {name: np.log10(rows["density"][rows["density"] > 0].to_numpy(float)) for _, name, rows in saes}
    return histogram(
        "density",
        "How often features fire",
        f"Histogram of the base-10 logarithm of feature density for {len(saes)} SAEs.",
        values,
        x_title="log10 density (share of tokens on which a feature fires)",
        y_title="features",
        caption="Features that never fired are left out.",
    )


def _maxima(saes: Sequence[tuple[Artifact, str, pd.DataFrame]]) -> Figure:
    values = {name: rows["max_activation"][~rows["is_dead"]].to_numpy(float) for _, name, rows in saes}
    return histogram(
        "max-activation",
        "How strongly features fire at most",
        f"Histogram of the largest activation of each live feature for {len(saes)} SAEs.",
        values,
        x_title="largest activation",
        y_title="features",
    )
