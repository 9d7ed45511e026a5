"""The five comparisons: which measure describes a class of heads, and which intervention shows what it does.

| class | described by | caused |
|---|---|---|
| previous token | attention to the token before, random tokens | fall of induction heads' diagonal without the head |
| duplicate token | attention from S2 to S1, IOI prompts | fall of the logit difference, z at S2 exchanged |
| induction | induction diagonal, random tokens | fall of the logit difference on other random tokens, z ablated |
| subject inhibition | attention from the end to S2 | fall through the queries of name movers (path patching) |
| name mover | direct logit attribution | fall through the logits alone (path patching) |

Everything on the left is read from one plain run; everything on the right needs runs with changed activations.
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from bench.heads.agreement import Comparison, Measure
from bench.heads.runs import Runs, matched
from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.attribution.attributions import Attributions
from mi_pipe.heads.inhibition import Head
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.source import load_source
from mi_pipe.patching.effects import PatchEffects

_IOI = "ioi"


def compared(runs: Runs) -> Iterator[Comparison]:
    """Yield the comparisons, cheapest first; each is measured when it is asked for."""
    scores = runs.heads()
    at_end = _fall_at(runs.at_place("end"), "end")
    yield _name_movers(runs, scores, at_end)
    yield _subject_inhibition(runs, scores, at_end)
    yield _duplicates(runs, scores)
    yield _induction(runs, scores)
    yield _previous(runs, scores)


def _name_movers(runs: Runs, scores: HeadScores, at_end: Measure) -> Comparison:
    written = Measure.of_pairs("direct logit attribution", scores.attribution(_IOI)["heads"].to_numpy())
    direct = _fall_through(runs.paths(["logits"], runs.info.n_layers), "the logits alone", runs.info)
    beside = [at_end, _attention(scores, "end", "io"), _score(scores, "name_copying")]
    return Comparison("Name movers", written, direct, beside)


def _subject_inhibition(runs: Runs, scores: HeadScores, at_end: Measure) -> Comparison:
    movers = members(scores, "name_mover")
    receivers = [f"a{layer}.h{head}.q" for layer, head in movers]
    steered = _fall_through(runs.paths(receivers, max(layer for layer, _ in movers)), "name movers' queries", runs.info)
    beside = [at_end, _composed(scores, "q", movers)]
    return Comparison("Subject inhibition", _attention(scores, "end", "s2"), steered, beside)


def _duplicates(runs: Runs, scores: HeadScores) -> Comparison:
    inhibitors = members(scores, "subject_inhibition")
    share = runs.info.n_heads // runs.info.n_kv_heads
    kind = "kv" if share > 1 else "h"
    receivers = list(dict.fromkeys(f"a{layer}.{kind}{head // share}.v" for layer, head in inhibitors))
    last = max(layer for layer, _ in inhibitors)
    beside = [
        _score(scores, "duplicate_token"),
        _fall_through(runs.paths(receivers, last), "inhibition heads' values", runs.info),
        _attention(scores, "s2", "s1_next"),
    ]
    return Comparison("Duplicate tokens", _attention(scores, "s2", "s1"), _fall_at(runs.at_place("s2"), "s2"), beside)


def _induction(runs: Runs, scores: HeadScores) -> Comparison:
    found = runs.copies()
    caused = Measure.of_pairs("fall, mean-ablated", _fall(found, found.effects("head_out")).to_numpy())
    beside = [_score(scores, "prefix_matching"), _score(scores, "sequence_copying")]
    return Comparison("Induction", _score(scores, "induction"), caused, beside)


def _previous(runs: Runs, scores: HeadScores) -> Comparison:
    inducers = members(scores, "induction")
    senders = [(layer, head) for layer in range(max(a for a, _ in inducers)) for head in range(runs.info.n_heads)]
    falls = matched(load_source(runs.model, runs.device), senders, inducers, runs.sizes.seed)
    caused = Measure("fall of the induction diagonal", _grid(runs.info, falls))
    beside = [_composed(scores, "k", inducers)]
    return Comparison("Previous token", _score(scores, "previous_token"), caused, beside)


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


def _fall_at(found: PatchEffects, place: str) -> Measure:
    at_place = found.at_places("head_out_by_pos", [place]).sel(place=place)
    return Measure.of_pairs(f"fall, exchanged at {place}", _fall(found, at_place).to_numpy())


def _fall(found: PatchEffects, patched: xr.DataArray) -> xr.DataArray:
    clean = found.to_xarray()["clean"]
    return (clean - patched).transpose("pair", "layer", "head")


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
