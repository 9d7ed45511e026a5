"""One harvest being filled: its plan, the place of its shards, and the scratch space of their sums.

`HarvestJob` knows which shards are done and fills others; it runs alike in the harvest itself, in a repair, and in
workers that share the work, since a shard is a function of (plan, shard) alone.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mi_pipe.activations.commits import COMMITS_FOLDER, Commit, committed
from mi_pipe.activations.group import create_group, plan_of_group, remove_group
from mi_pipe.activations.harvest.forward import RowSource
from mi_pipe.activations.harvest.harvester import harvest_shards
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.harvest.sums_file import SUMS_FOLDER
from mi_pipe.activations.harvest.writer import ShardWriter
from mi_pipe.core.place import Place


def _ignore(_: int) -> None:
    """Listen to nothing."""


@dataclass(frozen=True)
class HarvestJob:
    """A plan and where its results go."""

    plan: HarvestPlan
    place: Place
    """The artifact's folder, here or in an object store."""
    scratch: Place
    """Where the sums of finished shards wait for the end."""

    @property
    def hooks(self) -> list[str]:
        """The hook points, in the order of the store."""
        return [array.name for array in self.plan.layout.arrays]

    def prepare(self, building: Path, attributes: dict[str, Any]) -> bool:
        """Make the group unless it is there; what another plan left is removed. Say whether that was so.

        `building` is a local folder to make the group in. Shards of this plan stay, if it is the group's metadata that
        cannot be read any more.
        """
        found = plan_of_group(self.place)
        if found == self.plan.hash:
            return False
        if found is not None or not self.commits():
            self._remove_all()
        tokens = self.plan.tokens
        layout = {"plan_hash": self.plan.hash, "hooks": self.hooks, "shard_rows": self.plan.layout.shard_rows}
        sizes = {"n_tokens": self.plan.layout.n_rows, "n_prompts": tokens.n_prompts}
        create_group(
            self.place, building, self.plan.layout, tokens.row_arrays(), tokens.row_offsets, attributes | layout | sizes
        )
        return found is not None

    def _remove_all(self) -> None:
        for key in [*self.place.keys(COMMITS_FOLDER)]:
            self.place.remove(key)
        for key in [*self.scratch.keys(SUMS_FOLDER)]:
            self.scratch.remove(key)
        remove_group(self.place)

    def commits(self) -> dict[int, Commit]:
        """Return the records of the shards that are done."""
        layout = self.plan.layout
        found = {shard: committed(self.place, layout, self.plan.hash, shard) for shard in range(layout.n_shards)}
        return {shard: commit for shard, commit in found.items() if commit is not None}

    def fill(
        self,
        source: RowSource,
        shards: Collection[int],
        on_commit: Callable[[int], None] = _ignore,
        on_rows: Callable[[int], None] = _ignore,
    ) -> None:
        """Run the model over the batches of some shards and commit each; raises StorageOverflowError and others."""
        done = set(range(self.plan.layout.n_shards)) - set(shards)
        with ShardWriter(self.place, self.scratch, self.plan.layout, self.plan.hash, on_commit) as writer:
            harvest_shards(self.plan, source, writer, done, on_rows)
