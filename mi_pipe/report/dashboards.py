"""Dashboards of features as data: read by column, cut by feature, written in chunks.

Tables of examples are large (features times examples times window), so they are held as arrow columns and flat
arrays, never as rows of Python objects, and only what a report shows is read out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from mi_pipe.report.html import rounded

DIGITS = 4
_TOP = "top"


@dataclass(frozen=True)
class Examples:
    """Examples of chosen features of one SAE, sorted by feature; token windows lie flat after one another."""

    feature: Int[np.ndarray, " example"]
    group: list[str]
    activation: Float[np.ndarray, " example"]
    prompt: Int[np.ndarray, " example"]
    first_pos: Int[np.ndarray, " example"]
    peak: Int[np.ndarray, " example"]
    """Place in the window of the token the example is about."""
    offsets: Int[np.ndarray, " edge"]
    token: Int[np.ndarray, " token"]
    """Number of each token in `words`."""
    words: list[str]
    strength: Float[np.ndarray, " token"]
    """Activation on each token of the windows."""

    def of(self, feature: int) -> range:
        """Return the examples of one feature."""
        start, stop = np.searchsorted(self.feature, [feature, feature + 1])
        return range(int(start), int(stop))

    def peaks(self, feature: int, n: int) -> list[str]:
        """Return the distinct tokens on which the feature fires most, strongest first."""
        rows = [i for i in self.of(feature) if self.group[i] == _TOP]
        words = (self.words[self.token[self.offsets[i] + self.peak[i]]] for i in rows)
        return list(dict.fromkeys(words))[:n]

    def lines(self, feature: int, texts: dict[str, int]) -> list[Any]:
        """Return the examples of one feature for its page.

        Each is [group, activation, prompt, first pos, peak, token numbers, firing places, their values]; token
        numbers refer to `texts`, which grows by the tokens met.
        """
        return [self._line(i, texts) for i in self.of(feature)]

    def _line(self, i: int, texts: dict[str, int]) -> list[Any]:
        window = slice(self.offsets[i], self.offsets[i + 1])
        tokens = [texts.setdefault(self.words[j], len(texts)) for j in self.token[window].tolist()]
        strength = self.strength[window]
        # NaN marks tokens that are not stored (BOS, massive rows): nothing fired there as far as is known.
        places = np.flatnonzero(np.nan_to_num(strength))
        place = [int(self.prompt[i]), int(self.first_pos[i]), int(self.peak[i])]
        activation = rounded(self.activation[i : i + 1], DIGITS)
        return [self.group[i], *activation, *place, tokens, places.tolist(), rounded(strength[places], DIGITS)]


@dataclass(frozen=True)
class Effects:
    """Logit effects of chosen features of one SAE: for each the promoted and the suppressed tokens, strongest first."""

    rows: dict[int, dict[str, list[Any]]]

    def of(self, feature: int) -> dict[str, list[Any]]:
        """Return `promoted` and `suppressed` as lists of [token, effect]."""
        return self.rows.get(feature, {"promoted": [], "suppressed": []})

    def promoted(self, feature: int, n: int) -> list[str]:
        """Return the tokens that the feature promotes most."""
        return [token for token, _ in self.of(feature)["promoted"][:n]]


def read_examples(path: Path, sae: str, features: Int[np.ndarray, " feature"]) -> Examples:
    """Read the examples of some features of one SAE from `examples.parquet`."""
    table = _chosen(path, sae, features, [("feature", "ascending")])
    groups = table["group"].to_pylist()
    order = np.lexsort([_array(table["rank"]), [group != _TOP for group in groups], _array(table["feature"])])
    table = table.take(pa.array(order)).combine_chunks()
    windows, strengths = (_flat(table[name]) for name in ("tokens", "activations"))
    encoded = _flat_values(windows).dictionary_encode()
    lengths = pc.call_function("list_value_length", [windows]).to_numpy(zero_copy_only=False)
    return Examples(
        feature=_array(table["feature"]),
        group=table["group"].to_pylist(),
        activation=_array(table["activation"]),
        prompt=_array(table["prompt_idx"]),
        first_pos=_array(table["first_pos"]),
        peak=_array(table["pos"]) - _array(table["first_pos"]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token=encoded.indices.to_numpy(zero_copy_only=False),
        words=encoded.dictionary.to_pylist(),
        strength=_flat_values(strengths).to_numpy(zero_copy_only=False),
    )


def read_effects(path: Path, sae: str, features: Int[np.ndarray, " feature"]) -> Effects:
    """Read the logit effects of some features of one SAE from `logit_effects.parquet`."""
    order = [("feature", "ascending"), ("sign", "ascending"), ("rank", "ascending")]
    table = _chosen(path, sae, features, order)
    rows: dict[int, dict[str, list[Any]]] = {}
    values = rounded(_array(table["effect"]), DIGITS)
    columns = (table[name].to_pylist() for name in ("feature", "sign", "token"))
    for feature, sign, token, effect in zip(*columns, values, strict=True):
        rows.setdefault(feature, {"promoted": [], "suppressed": []})[sign].append([token, effect])
    return Effects(rows)


def chunk(
    features: Int[np.ndarray, " feature"],
    examples: Examples,
    effects: Effects,
    counts: Int[np.ndarray, "feature bin"],
    edges: Float[np.ndarray, "feature edge"],
    norms: Mapping[int, list[list[Any]]],
) -> Mapping[str, Any]:
    """Return the dashboards of some features; tokens are written once and referred to by number.

    `norms` are what a crosscoder's features write at each hook point, empty for other SAEs.
    """
    texts: dict[str, int] = {}
    dashboards = {
        int(feature): {
            "examples": examples.lines(int(feature), texts),
            "effects": effects.of(int(feature)),
            "counts": counts[feature].tolist(),
            "edges": rounded(edges[feature], DIGITS),
            "norms": norms.get(int(feature), []),
        }
        for feature in features
    }
    return {"dashboards": dashboards, "tokens": list(texts)}


def _chosen(path: Path, sae: str, features: Int[np.ndarray, " feature"], order: list[tuple[str, str]]) -> pa.Table:
    table = pq.read_table(path, filters=[("sae", "=", sae)])
    is_chosen = np.isin(_array(table["feature"]), features)
    return table.filter(pa.array(is_chosen)).sort_by(order)


def _array(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy()


def _flat(column: pa.ChunkedArray) -> Any:
    """Return a list column as one array."""
    found = column.combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks or [pa.array([], column.type)])


def _flat_values(lists: Any) -> Any:
    """Return the items of a list array after one another, as plain values."""
    values = lists.flatten()
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
