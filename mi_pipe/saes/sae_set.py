"""The read side of `train_saes`: the trained SAEs by name, their training curves and their evaluation."""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ArtifactDamagedError, ArtifactNotFoundError, near_names
from mi_pipe.core.manifest import damage_text
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.storage import probe_agrees, probe_checksum, read_sae

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"
PROBE_FILE = "probe.safetensors"
TRAINING_FILE = "training.parquet"
EVALUATION_FILE = "evaluation.parquet"
HELD_OUT_FILE = "held_out.parquet"
DENSITIES_FILE = "densities.parquet"
TIMING_FILE = "timing.parquet"
STATE_FOLDER = "state"


class SAESet(Artifact):
    """Trained SAEs: `set[name]` is one, loaded and checked against its probe batch."""

    @cached_property
    def names(self) -> list[str]:
        """Names of the SAEs, in the order of the sweep."""
        return [str(name) for name in self.evaluation["sae"]]

    @cached_property
    def evaluation(self) -> "pd.DataFrame":
        """One row an SAE: metrics on held-out prompts."""
        return self.read_table(EVALUATION_FILE)

    @cached_property
    def training(self) -> "pd.DataFrame":
        """Training curves: one row an SAE and interval."""
        return self.read_table(TRAINING_FILE)

    @cached_property
    def held_out(self) -> "pd.DataFrame":
        """Metrics on held-out rows at moments of the training: one row an SAE and moment."""
        return self.read_table(HELD_OUT_FILE)

    @cached_property
    def densities(self) -> "pd.DataFrame":
        """Histograms of feature densities at the same moments, by bins of log10 of the share of rows."""
        return self.read_table(DENSITIES_FILE)

    @cached_property
    def timing(self) -> "pd.DataFrame":
        """Speed of the training and the share of time that waited for data; of the launches that made this artifact."""
        return self.read_table(TIMING_FILE)

    def state_of(self, name: str) -> "dict[str, Tensor]":
        """Return the state in which an SAE's training ended; raises ArtifactNotFoundError if it was not kept."""
        self.config_of(name)
        file = f"{STATE_FOLDER}/{name}.safetensors"
        if file not in self.manifest.files:
            raise ArtifactNotFoundError(f"{self.id} has not kept the state of {name}; use keep_state for that.")
        return self.read_tensors(file)

    @cached_property
    def _probes(self) -> "dict[str, Tensor]":
        return self.read_tensors(PROBE_FILE)

    def config_of(self, name: str) -> dict[str, Any]:
        """Return what an SAE's config.json says; raises ArtifactNotFoundError for an unknown name."""
        if name not in self.names:
            near = near_names(name, self.names) or f" It has: {', '.join(self.names)}."
            raise ArtifactNotFoundError(f"{self.id} has no SAE {name!r}.{near}")
        return self.read_json(f"saes/{name}/{CONFIG_FILE}")

    def of_hook(self, hook: str) -> list[str]:
        """Return the names of the SAEs trained at a hook point."""
        return [name for name in self.names if self.config_of(name)["hook"] == hook]

    def __getitem__(self, name: str) -> SAE:
        """Load one SAE; raises ArtifactDamagedError if it does not give its probe's outputs."""
        config = self.config_of(name)
        sae = read_sae(config, self.read_tensors(f"saes/{name}/{WEIGHTS_FILE}"))
        probe = {part: self._probes[f"{name}.{part}"] for part in ("input", "output")}
        if probe_checksum(probe) != config["probe_sha256"] or not probe_agrees(sae, probe):
            raise ArtifactDamagedError(damage_text(self.id, f"{name} does not reproduce its probe batch"))
        return sae

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of SAEs."""
        return len(self.names)
