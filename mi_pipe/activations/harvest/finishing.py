"""What is written when every shard of a store is there: statistics, the token table, the shards' checksums."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from jaxtyping import Bool

from mi_pipe.activations.commits import Commit
from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.activations.harvest.totals import totals
from mi_pipe.activations.layout import StoreLayout
from mi_pipe.activations.row_table import TOKENS_FILE, write_row_table
from mi_pipe.activations.store import STATISTICS_FILE
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.place import Place
from mi_pipe.core.workspace import Workspace

Flags = dict[str, Bool[np.ndarray, " row"]]


def finish_store(
    work: Workspace,
    place: Place,
    scratch: Place,
    layout: StoreLayout,
    commits: Iterable[Commit],
    massive_factor: float,
    token_table: Callable[[Flags], Iterable[pd.DataFrame]],
) -> dict[str, Scalar]:
    """Write statistics and token table, hand over the checksums that the commits hold; return the main figures.

    `token_table` makes the table, in blocks, of the flags of massive rows by hook point.
    """
    for commit in commits:
        for key, (size_bytes, checksum) in commit.files.items():
            work.checksum(f"{GROUP_NAME}/{key}", checksum, size_bytes)
    found = totals(place.within(GROUP_NAME), scratch, layout, massive_factor)
    tensors = {key: value for name, item in found.items() for key, value in item.statistics.to_tensors(name).items()}
    work.write_tensors(STATISTICS_FILE, tensors)
    write_row_table(work.path(TOKENS_FILE), token_table({name: item.massive for name, item in found.items()}))
    return {
        "n_rows": layout.n_rows,
        "n_hooks": len(found),
        "n_shards": layout.n_shards,
        "n_massive": max(item.statistics.n_massive for item in found.values()),
    }
