"""The feature browser: a list of all features, and for many a dashboard that the page loads when it is asked for.

Dashboards lie in chunks of `CHUNK` features, one data script a chunk, so that thousands of features cost the
reader only what is looked at. Which features get one: evenly over the ranks of density, so that the rare and the
frequent are both there. Of crosscoders it shows too how strongly a feature writes at each hook point.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from mi_pipe.core.artifact import Artifact
from mi_pipe.report.crosscoders import DecoderNorms, counts_table, read_norms, share_figures
from mi_pipe.report.dashboards import DIGITS, Effects, Examples, chunk, read_effects, read_examples
from mi_pipe.report.figures import Figure, histogram
from mi_pipe.report.html import rounded, slug
from mi_pipe.report.naming import sae_title
from mi_pipe.report.page import Page

CHUNK = 50
_N_SEARCHED = 6


@dataclass(frozen=True)
class _Sae:
    """One SAE: its artifact, its name there and on the page, and what is read of it."""

    artifact: Artifact
    name: str
    title: str
    rows: pd.DataFrame
    """Its part of `features.parquet`."""
    norms: DecoderNorms | None

    @property
    def key(self) -> str:
        return f"features/{slug(self.artifact.id)}/{slug(self.name)}"

    @property
    def is_live(self) -> Bool[np.ndarray, " feature"]:
        return ~self.rows["is_dead"].to_numpy(bool)

    def listing(self) -> dict[str, Any]:
        """Return what the page's script needs to begin with."""
        return {
            "name": self.title,
            "key": self.key,
            "n_features": len(self.rows),
            "n_dead": int((~self.is_live).sum()),
            "chunk": CHUNK,
            "hooks": self.norms.hooks if self.norms else [],
        }


def page(sets: Sequence[Artifact], n_features: int) -> Page:
    """Make the browser of the features of all SAEs in `sets`, with at most `n_features` dashboards an SAE."""
    saes = [
        _Sae(artifact, str(name), sae_title(artifact, str(name), len(sets)), rows.reset_index(drop=True), norms)
        for artifact in sets
        for name, rows in artifact.read_table("features.parquet").groupby("sae", sort=False, observed=True)
        for norms in [read_norms(artifact, str(name))]
    ]
    norms = {sae.title: sae.norms for sae in saes if sae.norms}
    live = {sae.title: sae.is_live for sae in saes}
    titled = {sae.title: sae.rows for sae in saes}
    figures = [] if not saes else [_densities(titled), _maxima(titled), *share_figures(norms, live)]
    return Page(
        context={
            "saes": [sae.listing() for sae in saes],
            "n_dashboards": n_features,
            "figures": [figure.name for figure in figures],
            "shares": counts_table(norms, live),
        },
        figures=figures,
        tables={f"features-{slug(title)}": rows for title, rows in titled.items()},
        scripts=_scripts(saes, n_features),
    )


def chosen(rows: pd.DataFrame, n_features: int) -> np.ndarray:
    """Return the numbers of the features that get a dashboard, ascending; dead features get none."""
    numbers, density = rows["feature"].to_numpy(), rows["density"].to_numpy()
    alive = numbers[np.lexsort([numbers, density])]
    alive = alive[~np.isin(alive, numbers[rows["is_dead"].to_numpy(bool)])]
    if len(alive) > n_features:
        alive = alive[np.linspace(0, len(alive) - 1, n_features).round().astype(int)]
    return np.sort(alive)


def _scripts(saes: Sequence[_Sae], n_features: int) -> Iterator[tuple[str, Any]]:
    """Yield for each SAE its list and then its chunks, one SAE's tables in memory at a time."""
    for sae in saes:
        numbers = chosen(sae.rows, n_features)
        examples = read_examples(sae.artifact.file("examples.parquet"), sae.name, numbers)
        effects = read_effects(sae.artifact.file("logit_effects.parquet"), sae.name, numbers)
        bins = sae.artifact.read_tensors("histograms.safetensors")
        counts, edges = (bins[f"{sae.name}.{part}"].numpy() for part in ("counts", "edges"))
        yield f"{sae.key}/index", _index(sae, numbers, examples, effects)
        for i in range(0, len(numbers), CHUNK):
            part = numbers[i : i + CHUNK]
            norms = sae.norms.of(part) if sae.norms else {}
            yield f"{sae.key}/{i // CHUNK}", chunk(part, examples, effects, counts, edges, norms)


def _index(sae: _Sae, numbers: np.ndarray, examples: Examples, effects: Effects) -> dict[str, Any]:
    """Return the list of features as columns; `place` is a dashboard's number in the chunks, or -1.

    Of crosscoders, `share` is that of the last hook point.
    """
    rows = sae.rows
    place = {int(feature): i for i, feature in enumerate(numbers)}
    features: list[int] = rows["feature"].tolist()
    return {
        "feature": features,
        "density": rounded(rows["density"].to_numpy(float), DIGITS),
        "max": rounded(rows["max_activation"].to_numpy(float), DIGITS),
        "mean": rounded(rows["mean_activation"].to_numpy(float), DIGITS),
        "share": rounded(sae.norms.share[:, -1], DIGITS) if sae.norms else [],
        "dead": rows["is_dead"].astype(int).tolist(),
        "place": [place.get(feature, -1) for feature in features],
        "tokens": [examples.peaks(feature, _N_SEARCHED) if feature in place else [] for feature in features],
        "promoted": [effects.promoted(feature, _N_SEARCHED) for feature in features],
    }


def _densities(saes: Mapping[str, pd.DataFrame]) -> Figure:
    values = {name: _log_positive(rows["density"].to_numpy(float)) for name, rows in saes.items()}
    return histogram(
        "density",
        "How often features fire",
        f"Histogram of the base-10 logarithm of feature density for {len(saes)} SAEs.",
        values,
        x_title="log10 density (share of tokens on which a feature fires)",
        y_title="features",
        caption="Features that never fired are left out.",
    )


def _maxima(saes: Mapping[str, pd.DataFrame]) -> Figure:
    values = {
        name: rows["max_activation"].to_numpy(float)[~rows["is_dead"].to_numpy(bool)] for name, rows in saes.items()
    }
    return histogram(
        "max-activation",
        "How strongly features fire at most",
        f"Histogram of the largest activation of each live feature for {len(saes)} SAEs.",
        values,
        x_title="largest activation",
        y_title="features",
    )


def _log_positive(values: np.ndarray) -> np.ndarray:
    return np.log10(values[values > 0])
