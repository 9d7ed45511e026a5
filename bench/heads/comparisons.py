"""The five comparisons: which measure describes a class of heads, and which intervention shows what it does.

| class | described by | caused |
|---|---|---|
| previous token | attention to the token before, random tokens | fall of induction heads' diagonal without the head |
| duplicate token | attention from S2 to S1, IOI prompts | fall of the logit difference, z at S2 exchanged |
| induction | induction diagonal, random tokens | fall of the logit difference on other random tokens, z ablated |
| subject inhibition | attention from the end to S2 | fall through the queries of name movers (path patching) |
| name mover | direct logit attribution | fall through the logits alone (path patching) |

Everything on the left is read from plain runs; everything on the right needs runs with changed activations. Path
patching into the logits is of all heads, into queries and values of 36: the 12 that the class's description ranks
first, the 12 whose exchange at the same place changes the logit difference most, and 12 others at random.
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from bench.heads.agreement import Comparison, Measure, top
from bench.heads.runs import Runs, matched
from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.attribution.attributions import Attributions
from mi_pipe.heads.inhibition import Head
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.source import load_source
from mi_pipe.patching.effects import PatchEffects

_IOI = "ioi"
_N_CHOSEN = 12


def compared(runs: Runs) -> Iterator[Comparison]:
    """Yield the comparisons; each is measured when it is asked for."""
    scores = runs.heads()
    at_end = _fall_at(runs.at_place("end"), "end")
    yield _name_movers(runs, scores, at_end)
    yield _subject_inhibition(runs, scores, at_end)
    yield _duplicates(runs, scores)
    yield _induction(runs, scores)
    yield _previous(runs, scores)


def _name_movers(runs: Runs, scores: HeadScores, at_end: Measure) -> Comparison:
    written = Measure.of_pairs("direct logit attribution", scores.attribution(_IOI)["heads"].to_numpy())
    every = [(layer, head) for layer in range(runs.info.n_layers) for head in range(runs.info.n_heads)]
    direct = _fall_through(runs.paths(["logits"], every), "the logits alone", runs.info)
    beside = [at_end, _attention(scores, "end", "io"), _score(scores, "name_copying")]
    return Comparison("Name movers", written, direct, beside)


def _subject_inhibition(runs: Runs, scores: HeadScores, at_end: Measure) -> Comparison:
    movers = members(scores, "name_mover")
    receivers = [f"a{layer}.h{head}.q" for layer, head in movers]
    attention = _attention(scores, "end", "s2")
    heads = chosen(attention, at_end, max(layer for layer, _ in movers))
    steered = _fall_through(runs.paths(receivers, heads), "name movers' queries", runs.info)
    beside = [at_end, _composed(scores, "q", movers)]
    return Comparison("Subject inhibition", attention, steered, beside)


def _duplicates(runs: Runs, scores: HeadScores) -> Comparison:
    inhibitors = members(scores, "subject_inhibition")
    share = runs.info.n_heads // runs.info.n_kv_heads
    kind = "kv" if share > 1 else "h"
    receivers = list(dict.fromkeys(f"a{layer}.{kind}{head // share}.v" for layer, head in inhibitors))
    attention, at_s2 = _attention(scores, "s2", "s1"), _fall_at(runs.at_place("s2"), "s2")
    heads = chosen(attention, at_s2, max(layer for layer, _ in inhibitors))
    through = _fall_through(runs.paths(receivers, heads), "inhibition heads' values", runs.info)
    beside = [_score(scores, "duplicate_token"), through, _attention(scores, "s2", "s1+1")]
    return Comparison("Duplicate tokens", attention, at_s2, beside)


def _induction(runs: Runs, scores: HeadScores) -> Comparison:
    caused = _fall_at(runs.copies(), "end", "mean-ablated")
    beside = [_score(scores, "prefix_matching"), _score(scores, "sequence_copying")]
    return Comparison("Induction", _score(scores, "induction"), caused, beside)


def _previous(runs: Runs, scores: HeadScores) -> Comparison:
    inducers = members(scores, "induction")
    # Layers below all of them, so that every sender is measured by the same receivers.
    senders = [(layer, head) for layer in range(min(a for a, _ in inducers)) for head in range(runs.info.n_heads)]
    falls = matched(load_source(runs.model, runs.device), senders, inducers, runs.sizes.seed)
    caused = Measure("fall of the induction diagonal", _grid(runs.info, falls))
    beside = [_composed(scores, "k", inducers)]
    return Comparison("Previous token", _score(scores, "previous_token"), caused, beside)


def chosen(described: Measure, exchanged: Measure, n_layers: int) -> list[Head]:
    """Return 36 heads of the layers below `n_layers`: the 12 first of each in absolute value, and 12 others."""
    n_heads = described.values.shape[1]
    measures = [np.abs(measure.values[:n_layers]) for measure in (described, exchanged)]
    first = dict.fromkeys(head for values in measures for head in top(values, _N_CHOSEN))
    others = [head for head in range(n_layers * n_heads) if head not in first]
    drawn = np.random.default_rng(0).choice(others, min(3 * _N_CHOSEN - len(first), len(others)), replace=False)
    return [(int(head) // n_heads, int(head) % n_heads) for head in sorted([*first, *drawn])]


def members(scores: HeadScores, name: str) -> list[Head]:
    """Return the heads that the stage put into a class."""
    found = scores.classes(name)[["layer", "head"]].to_numpy()
    return [(int(layer), int(head)) for layer, head in found]


def _score(scores: HeadScores, name: str) -> Measure:
    return Measure(name.replace("_", " "), scores.grid(name).to_numpy())


def _attention(scores: HeadScores, query: str, key: str) -> Measure:
    cells = scores.attention(_IOI)["places"].sel({"from": query, "to": key})
    return Measure.of_pairs(f"attention {query} to {key}", cells.to_numpy())


def _composed(scores: HeadScores, kind: str, later: list[Head]) -> Measure:
    """Return the mean composition with these heads, less that of random weights."""
    whole = scores.composition(above_random=True).sel(kind=kind)
    cells = xr.concat([whole.sel(later_layer=layer, later_head=head, drop=True) for layer, head in later], "receiver")
    return Measure(f"{kind.upper()}-composition above random", cells.mean("receiver").to_numpy())


def _fall_at(found: PatchEffects, place: str, how: str = "exchanged") -> Measure:
    at_place = found.at_places("head_out_by_pos", [place]).sel(place=place)
    falls = (found.to_xarray()["clean"] - at_place).transpose("pair", "layer", "head")
    return Measure.of_pairs(f"fall, {how} at {place}", falls.to_numpy())


def _fall_through(found: Attributions, receivers: str, info: ModelInfo) -> Measure:
    table = found.paths()
    by_pair = table.set_index(["pair", "layer", "head"])["effect"].to_xarray()
    everywhere = by_pair.reindex(layer=np.arange(info.n_layers), head=np.arange(info.n_heads))
    return Measure.of_pairs(f"fall through {receivers}", -everywhere.to_numpy())


def _grid(info: ModelInfo, values: dict[Head, float]) -> np.ndarray:
    grid = np.full((info.n_layers, info.n_heads), np.nan)
    for (layer, head), value in values.items():
        grid[layer, head] = value
    return grid
