"""What a harvest falls back to when its first plan cannot be carried out on this machine; kept in scratch space.

A value that does not fit float16 makes it begin again storing bfloat16, if the config says so; a batch that does not
fit into the device's memory makes it begin again with every batch cut in two, since which prompts are run together
changes the last bits: what is stored is a function of the plan, and the halvings are part of it. A harvest that is
continued begins where it had fallen back to.
"""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mi_pipe.activations.harvest.forward import BatchTooLargeError
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.harvest.writer import StorageOverflowError
from mi_pipe.activations.storage_dtype import StoreDType
from mi_pipe.core.atomic import write_json

FALLBACK_FILE = "fallback.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fallback:
    """What differs from the plan that the config asks for."""

    store_dtype: StoreDType
    halvings: int = 0
    """How often every batch is cut in two."""
    overflow: str = field(default="", compare=False)
    """What did not fit the storage dtype that was asked for: rows, shard and hook point, as the first error said."""

    @classmethod
    def read(cls, scratch: Path, store_dtype: StoreDType) -> "Fallback":
        """Return what an earlier launch has fallen back to, or nothing different from what is asked for."""
        try:
            return cls(**json.loads((scratch / FALLBACK_FILE).read_bytes()))
        except FileNotFoundError:
            return cls(store_dtype)

    def write(self, scratch: Path) -> None:
        """Keep it for the next launch."""
        write_json(scratch / FALLBACK_FILE, asdict(self))

    def with_bfloat16(self, error: StorageOverflowError) -> "Fallback":
        """Return the same, storing bfloat16; says so."""
        logger.warning("%s The harvest begins again, storing bfloat16.", error)
        return replace(self, store_dtype="bfloat16", overflow=str(error))

    def with_halved_batches(self, plan: HarvestPlan, error: BatchTooLargeError) -> "Fallback":
        """Return the same with the batches of `plan` cut in two; says so. Raises `error` for single prompts."""
        if plan.largest_batch == 1:
            raise error
        logger.warning("%s The harvest begins again with every batch cut in two.", error)
        return replace(self, halvings=self.halvings + 1)
