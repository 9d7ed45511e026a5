"""The page of prompts: what each set holds, what the tokenizer could not express, and samples to read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.report.figures import Figure, bars, histogram
from mi_pipe.report.html import slug
from mi_pipe.report.naming import short_name
from mi_pipe.report.page import Page

_MAX_SOURCES = 15
_MAX_TOKENS = 160
_POSITION = "pos_"


def page(sets: Sequence[PromptSet], n_samples: int) -> Page:
    """Make the page of prompt sets with `n_samples` prompts (or pairs) of each."""
    figures = [figure for prompts in sets for figure in _figures(prompts)]
    return Page(context={"sets": [_section(prompts, n_samples) for prompts in sets]}, figures=figures)


def _section(prompts: PromptSet, n_samples: int) -> dict[str, Any]:
    rows_a_sample = 2 if prompts.has_pairs else 1
    shown = range(min(prompts.n_prompts, n_samples * rows_a_sample))
    return {
        "name": _name(prompts),
        "id": prompts.id,
        "family": prompts.family,
        "has_pairs": prompts.has_pairs,
        "n_prompts": prompts.n_prompts,
        "n_tokens": prompts.n_tokens,
        "dropped": prompts.dropped,
        "samples": [_sample(prompts, i) for i in shown],
        "figures": [figure.name for figure in _figures(prompts)],
    }


def _sample(prompts: PromptSet, i: int) -> dict[str, Any]:
    row = prompts.prompts.iloc[i]
    texts = prompts.texts(i)
    sample = {
        "index": i,
        "source": str(row["source"]),
        "tokens": [
            {"text": text, "pos": pos, "mark": mark}
            for pos, (text, mark) in enumerate(zip(texts, _marks(row, len(texts)), strict=True))
        ][:_MAX_TOKENS],
        "n_more": max(len(texts) - _MAX_TOKENS, 0),
    }
    if prompts.has_pairs:
        sample |= {key: row[key] for key in ("role", "answer", "wrong")} | {"pair": int(row["pair"])}
    return sample


def _marks(row: pd.Series, n_tokens: int) -> list[str]:
    """Return for each token the name of the labelled position it is, such as "io", or ""."""
    marks = [""] * n_tokens
    for column, pos in row.items():
        if str(column).startswith(_POSITION) and not pd.isna(pos):
            marks[int(pos)] = str(column).removeprefix(_POSITION)
    return marks


def _figures(prompts: PromptSet) -> list[Figure]:
    stem, lengths = slug(prompts.id), prompts.prompts["n_tokens"]
    found = []
    if len(set(lengths)) > 1:
        found.append(
            histogram(
                f"lengths-{stem}",
                f"Prompt lengths: {_name(prompts)}",
                f"Histogram of the number of tokens a prompt, from {lengths.min()} to {lengths.max()}.",
                {"prompts": lengths.to_numpy()},
                n_bins=min(int(np.ptp(lengths.to_numpy())) + 1, 40),
                x_title="tokens",
                y_title="prompts",
            )
        )
    sources = prompts.prompts["source"].value_counts(sort=True).sort_index(kind="stable")
    if len(sources) > 1:
        top = sources.sort_values(ascending=False, kind="stable").head(_MAX_SOURCES)
        frame = pd.DataFrame({"source": top.index.astype(str), "prompts": top.to_numpy()})
        found.append(
            bars(
                f"sources-{stem}",
                f"Where the prompts come from: {_name(prompts)}",
                f"Bars of prompts by source; {len(sources)} sources, most from {frame['source'].iloc[0]}.",
                frame,
                "source",
                "prompts",
                x_title="prompts",
                caption=f"The {len(top)} largest of {len(sources)} sources." if len(top) < len(sources) else "",
            )
        )
    return found


def _name(prompts: PromptSet) -> str:
    return short_name(prompts) or prompts.family
