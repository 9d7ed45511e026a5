"""What a store holds in a few figures: by token, by hook point, and the mean of the rows a condition picks.

Rows are read block by block and only sums are kept (float64, in row order), so memory depends on the vocabulary and the
width, not on the number of rows. As in the stored statistics, massive rows are counted and otherwise left out.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from mi_pipe.activations.row_table import MASSIVE_PREFIX
from mi_pipe.activations.statistics import HookStatistics
from mi_pipe.activations.token_table import TEXT, TableBlock
from mi_pipe.activations.where import Texts
from mi_pipe.core.errors import ConfigError

if TYPE_CHECKING:
    from mi_pipe.activations.store import ActivationStore

_BLOCK_ROWS = 8192
_NO_TOKEN = -1


def by_token(store: "ActivationStore", hook: str, where: str | None) -> pd.DataFrame:
    """Return one line a token that occurs, the most frequent first, indexed by token_id.

    `text`, `n_rows`, `n_massive`, and over the rows that are not massive (NaN if all are) `mean_norm`, `std_norm`,
    `max_norm` and `mean_distance`: the mean distance from the mean of all rows.
    """
    centre = store.statistics(hook).mean
    sums = _TokenSums()
    for block, picked in _table_blocks(store, hook, where, ["token_id", TEXT]):
        token_id, texts = block.columns["token_id"], block.columns[TEXT]
        assert isinstance(token_id, np.ndarray)
        assert isinstance(texts, Texts)
        sums.name(token_id[picked], texts.codes[picked], texts)
        massive = _massive(block, hook)
        sums.add_massive(token_id[picked & massive])
        for rows, values in _values(store, hook, block.start, picked & ~massive):
            sums.add(token_id[rows - block.start], values, centre)
    return sums.table()


class _TokenSums:
    """Sums by token id; -1, as in a capture of items that are no tokens, is one too."""

    def __init__(self) -> None:
        self._texts: dict[int, str | None] = {}
        self._sums = {name: np.zeros(0) for name in ("n", "n_massive", "norm", "square", "largest", "distance")}

    def name(self, token_id: Int[np.ndarray, " row"], codes: Int[np.ndarray, " row"], texts: Texts) -> None:
        """Note the text of each token, and make room for it."""
        ids, first = np.unique(token_id, return_index=True)
        for token, code in zip(ids.tolist(), codes[first].tolist(), strict=True):
            self._texts.setdefault(token, texts.values[code] if code >= 0 else None)
        missing = int(ids.max(initial=_NO_TOKEN)) - _NO_TOKEN + 1 - len(self._sums["n"])
        if missing > 0:
            self._sums = {name: np.append(sums, np.zeros(missing)) for name, sums in self._sums.items()}

    def add_massive(self, token_id: Int[np.ndarray, " row"]) -> None:
        """Count massive rows."""
        np.add.at(self._sums["n_massive"], token_id - _NO_TOKEN, 1)

    def add(
        self,
        token_id: Int[np.ndarray, " row"],
        values: Float[np.ndarray, "row width"],
        centre: Float[np.ndarray, " width"],
    ) -> None:
        """Add rows that are not massive; `values` is overwritten."""
        at, norms = token_id - _NO_TOKEN, _norms(values)
        np.subtract(values, centre, out=values)
        np.add.at(self._sums["n"], at, 1)
        np.add.at(self._sums["norm"], at, norms)
        np.add.at(self._sums["square"], at, norms**2)
        np.maximum.at(self._sums["largest"], at, norms)
        np.add.at(self._sums["distance"], at, _norms(values))

    def table(self) -> pd.DataFrame:
        """Return the figures of the tokens that occur."""
        ids = np.array(sorted(self._texts), np.int64)
        sums = {name: values[ids - _NO_TOKEN] for name, values in self._sums.items()}
        n = np.where(sums["n"] > 0, sums["n"], np.nan)
        mean = sums["norm"] / n
        table = pd.DataFrame(
            {
                "text": [self._texts[token] for token in ids.tolist()],
                "n_rows": (sums["n"] + sums["n_massive"]).astype(np.int64),
                "n_massive": sums["n_massive"].astype(np.int64),
                "mean_norm": mean,
                "std_norm": np.sqrt(np.maximum(sums["square"] / n - mean**2, 0)),
                "max_norm": np.where(sums["n"] > 0, sums["largest"], np.nan),
                "mean_distance": sums["distance"] / n,
            },
            index=pd.Index(ids, name="token_id"),
        )
        return table.sort_values("n_rows", ascending=False, kind="stable")


def _norms(values: Float[np.ndarray, "row width"]) -> Float[np.ndarray, " row"]:
    return np.sqrt(np.einsum("ij,ij->i", values, values))


def mean(store: "ActivationStore", hook: str, where: str | None) -> Float[np.ndarray, " width"]:
    """Return the mean of the rows that `where` picks, massive ones left out; raises ConfigError if none is left."""
    total, n_rows = np.zeros(store.width(hook)), 0
    for block, picked in _table_blocks(store, hook, where, []):
        for _, values in _values(store, hook, block.start, picked & ~_massive(block, hook)):
            total += values.sum(0)
            n_rows += len(values)
    if n_rows == 0:
        raise ConfigError(f"No row of {store.id} fulfils {where!r} (massive rows at {hook} left out).")
    return total / n_rows


def by_layer(store: "ActivationStore") -> pd.DataFrame:
    """Return one line a hook point, from the stored statistics alone; see `_figures` for the columns."""
    lines = [{"hook": hook, **_figures(store.statistics(hook))} for hook in store.hooks]
    table = pd.DataFrame(lines).set_index("hook")
    table.insert(0, "width", [store.width(hook) for hook in store.hooks])
    table.insert(0, "kind", [_kind_of(hook) for hook in store.hooks])
    table.insert(0, "layer", pd.array([_layer_of(hook) for hook in store.hooks], "Int32"))
    return table


def _figures(found: HookStatistics) -> dict[str, Any]:
    """Return the figures of one hook point.

    `total_variance` is the sum of the variances, `mean_share` the share of the mean square norm that lies in the mean
    vector, `largest_dimension` the value with the largest variance and `largest_share` its share of the total.
    `effective_dimensions` is the participation ratio (Σ v)² / Σ v² of the variances v in the model's own basis: the
    width if all are equal, 1 if one dimension has all the variance. `participation` is the same of the covariance's
    eigenvalues, tr(C)² / tr(C²), which no choice of basis changes; NaN where the covariance was not kept.
    """
    variance = found.variance
    total = float(variance.sum())
    largest = int(variance.argmax())
    squares = float(np.square(variance).sum())
    return {
        "n_rows": found.n_rows,
        "n_massive": found.n_massive,
        "median_norm": found.median_norm,
        "mean_norm": found.mean_norm,
        "rms_norm": float(np.sqrt(found.mean_square_norm)),
        "max_norm": found.max_norm,
        "total_variance": total,
        "mean_share": 1 - found.mean_square_norm_centred / found.mean_square_norm if found.mean_square_norm else 0.0,
        "effective_dimensions": total**2 / squares if squares else 0.0,
        "participation": np.nan if found.covariance is None else _participation(found.covariance),
        "largest_dimension": largest,
        "largest_share": float(variance[largest]) / total if total else 0.0,
    }


def _participation(covariance: Float[np.ndarray, "width width"]) -> float:
    squares = float(np.square(covariance).sum())
    return float(np.trace(covariance)) ** 2 / squares if squares else 0.0


def _table_blocks(
    store: "ActivationStore", hook: str, where: str | None, columns: list[str]
) -> Iterator[tuple[TableBlock, Bool[np.ndarray, " row"]]]:
    """Yield the token table's blocks, with the massive rows of a hook point, and which rows `where` picks."""
    condition = None if where is None else store.condition(where, hook)
    asked = [] if condition is None else condition.columns
    store.array(hook)  # an unknown hook point is refused before the table is read
    for block in store.token_table.blocks(list(dict.fromkeys([*columns, MASSIVE_PREFIX + hook, *asked]))):
        picked = np.ones(block.n_rows, bool) if condition is None else condition.mask(block.columns, block.n_rows)
        yield block, picked


def _massive(block: TableBlock, hook: str) -> Bool[np.ndarray, " row"]:
    return np.asarray(block.columns[MASSIVE_PREFIX + hook], bool)


def _values(
    store: "ActivationStore", hook: str, first_row: int, picked: Bool[np.ndarray, " row"]
) -> Iterator[tuple[Int[np.ndarray, " row"], Float[np.ndarray, "row width"]]]:
    """Yield row numbers and values (float64) of the rows picked among those from `first_row` on."""
    for start in range(0, len(picked), _BLOCK_ROWS):
        rows = first_row + start + np.flatnonzero(picked[start : start + _BLOCK_ROWS])
        if len(rows):
            yield rows, store.take(hook, rows).astype(np.float64)


def _layer_of(hook: str) -> int | None:
    """Return the first whole number among a hook point's parts, None if there is none.

    >>> _layer_of("blocks.12.hook_resid_post"), _layer_of("model.layers.3.mlp"), _layer_of("hook_embed")
    (12, 3, None)
    """
    return next((int(part) for part in hook.split(".") if part.isdigit()), None)


def _kind_of(hook: str) -> str:
    """Return what is read there, without layer and `hook_`.

    >>> _kind_of("blocks.12.attn.hook_z"), _kind_of("hook_embed")
    ('attn.z', 'embed')
    """
    parts = hook.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[layer + 1 :]).replace("hook_", "")
