"""The page of stored activations: what was kept, how large it is, which rows are massive, what precision cost."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.artifact import Artifact
from mi_pipe.report.figures import Figure, histogram, lines
from mi_pipe.report.html import slug
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page

_N_SAMPLED = 4096
_N_BLOCKS = 8
_N_TOKENS = 12
_N_POSITIONS = 5
_NO_TOKEN = -1
"""What a capture of items that are no tokens has for token_id."""
_PRECISION_FILE = "precision.json"


def page(stores: Sequence[ActivationStore]) -> Page:
    """Make the page of one or more activation stores."""
    sections = [_section(store) for store in stores]
    return Page(
        context={"stores": sections},
        figures=[figure for store in stores for figure in (_norms(store), _variances(store))],
        tables={f"hooks-{section['slug']}": section["hooks"] for section in sections},
    )


def _section(store: ActivationStore) -> dict[str, Any]:
    stem = slug(store.id)
    return {
        "name": name_of(store),
        "id": store.id,
        "origin": _origin(store),
        "slug": stem,
        "n_rows": store.n_rows,
        "size_bytes": store.size_bytes,
        "hooks": pd.DataFrame([_hook_row(store, hook) for hook in store.hooks]),
        "massive": _massive_tokens(store),
        "precision": _precision(store),
        "figures": [f"norms-{stem}", f"variance-{stem}"],
    }


def _origin(store: ActivationStore) -> str:
    """Say where activations come from that no harvest made."""
    of = f" of {store.group.attrs['model']}" if store.group.attrs.get("model") else ""
    return {"import_activations": f"imported{of}", "capture": f"captured{of}"}.get(store.manifest.stage, "")


def _hook_row(store: ActivationStore, hook: str) -> dict[str, Any]:
    found = store.statistics(hook)
    return {
        "hook": hook,
        "width": store.width(hook),
        "rows": store.n_rows,
        "massive_rows": found.n_massive,
        "median_norm": found.median_norm,
        "rms_norm": float(np.sqrt(found.mean_square_norm)),
        "rms_norm_centred": float(np.sqrt(found.mean_square_norm_centred)),
        "max_norm": found.max_norm,
    }


def _massive_tokens(store: ActivationStore) -> list[dict[str, Any]]:
    """Return for each hook point with massive rows the tokens and positions they stand on, if rows are of tokens."""
    found = []
    for hook in store.hooks:
        is_massive = store.massive(hook)
        if not is_massive.any():
            continue
        rows = store.table(["pos", "text"])
        rows = rows[is_massive & (store.token_id != _NO_TOKEN)]
        texts, places = Counter(rows["text"]), Counter(rows["pos"])
        found.append(
            {
                "hook": hook,
                "n_rows": int(is_massive.sum()),
                "tokens": [(str(text), n) for text, n in texts.most_common(_N_TOKENS)],
                "positions": [(int(pos), n) for pos, n in places.most_common(_N_POSITIONS)],
            }
        )
    return found


def _precision(artifact: Artifact) -> pd.DataFrame | None:
    """Return `precision.json` as a table: one row a hook point where it has a record for each, None if of none."""
    if _PRECISION_FILE not in artifact.manifest.files:
        return None
    record = artifact.read_json(_PRECISION_FILE)
    nested = record.get("hooks", record) if isinstance(record, dict) else {}
    rows = {key: value for key, value in nested.items() if isinstance(value, dict)}
    if not nested:
        return None
    if rows:
        return pd.DataFrame([{"hook": hook, **values} for hook, values in rows.items()])
    return pd.DataFrame([{"figure": key, "value": value} for key, value in record.items()])


def _norms(store: ActivationStore) -> Figure:
    n_sampled = min(store.n_rows, _N_SAMPLED)
    values = {hook: _sampled_norms(store, hook) for hook in store.hooks}
    return histogram(
        f"norms-{slug(store.id)}",
        "Norms of activations",
        f"Histogram of the norm of {n_sampled} sampled rows at {len(store.hooks)} hook points, massive rows left out.",
        values,
        x_title="norm",
        y_title="rows",
        caption="Rows in blocks spread evenly over the store; massive rows left out.",
    )


def _sampled_norms(store: ActivationStore, hook: str) -> np.ndarray:
    size = -(-min(store.n_rows, _N_SAMPLED) // _N_BLOCKS)
    starts = np.unique(np.linspace(0, max(store.n_rows - size, 0), _N_BLOCKS).astype(int))
    is_massive = store.massive(hook)
    norms = [
        np.linalg.norm(store.read_rows(hook, start, start + size), axis=1)[~is_massive[start : start + size]]
        for start in starts.tolist()
    ]
    return np.concatenate(norms)


def _variances(store: ActivationStore) -> Figure:
    """Draw each hook point's variance by dimension, largest first: how unevenly it is spread."""
    parts = []
    for hook in store.hooks:
        shares = np.sort(store.statistics(hook).variance)[::-1]
        total = shares.sum() or 1.0
        parts.append(pd.DataFrame({"hook": hook, "rank": np.arange(1, len(shares) + 1), "share": shares / total}))
    frame = pd.concat(parts, ignore_index=True)
    return lines(
        f"variance-{slug(store.id)}",
        "Variance by dimension",
        f"Lines of each dimension's share of the variance, largest first; at most {frame['share'].max():.3g}.",
        frame,
        "rank",
        "share",
        by="hook",
        x_title="dimension, by its variance",
        y_title="share of the variance",
        log_x=True,
        log_y=bool((frame["share"] > 0).all()),
    )
