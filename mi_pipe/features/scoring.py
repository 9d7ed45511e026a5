"""All that is scored of some features from their firings, as one function that a stage calls a range at a time."""

from dataclasses import dataclass

import pyarrow as pa

from mi_pipe.features.contexts import TokenMap, windows_around
from mi_pipe.features.density import density_of
from mi_pipe.features.examples import choose_examples, sampled_features
from mi_pipe.features.firings import Firings
from mi_pipe.features.histograms import histograms_of
from mi_pipe.features.parts import Figures
from mi_pipe.features.tables import TokenText, example_table


@dataclass(frozen=True)
class Scoring:
    """What is asked for: see the fields of the same names in `stages/score_features.py`."""

    n_top: int
    n_quantiles: int
    n_per_quantile: int
    n_example_features: int | None
    context_before: int
    context_after: int
    n_bins: int
    seed: int


def score_range(
    scoring: Scoring, sae: str, d_sae: int, firings: Firings, tokens: TokenMap, text: TokenText
) -> tuple[Figures, pa.Table]:
    """Return the figures of the features in `firings`, and their part of `examples.parquet`."""
    examples = choose_examples(
        firings,
        tokens.prompt_of_row,
        scoring.n_top,
        scoring.n_quantiles,
        scoring.n_per_quantile,
        scoring.seed,
        sampled_features(d_sae, scoring.n_example_features, scoring.seed),
    )
    windows = windows_around(
        firings, tokens, examples.feature, examples.row, scoring.context_before, scoring.context_after
    )
    figures = Figures(density_of(firings, tokens.n_scored), *histograms_of(firings, scoring.n_bins))
    return figures, example_table(sae, examples, windows, tokens, text)
