"""The read side of `score_features`: tables, examples, effects, histograms and sparse latents by feature."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from jaxtyping import Float32, Int32
from torch import Tensor

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ArtifactNotFoundError, near_names
from mi_pipe.features.decoder_norms import no_decoder_norms

FEATURES_FILE = "features.parquet"
SAES_FILE = "saes.parquet"
HISTOGRAMS_FILE = "histograms.safetensors"
EXAMPLES_FILE = "examples.parquet"
EFFECTS_FILE = "logit_effects.parquet"
NORMS_FILE = "decoder_norms.parquet"
LATENTS_FOLDER = "latents"


@dataclass(frozen=True)
class Histogram:
    """How the activations of one feature are spread over the rows on which it fires."""

    counts: Int32[np.ndarray, " bin"]
    edges: Float32[np.ndarray, " edge"]


class FeatureSet(Artifact):
    """Scored features of one or several SAEs."""

    @cached_property
    def saes(self) -> pd.DataFrame:
        """`saes.parquet`, one row an SAE."""
        return self.read_table(SAES_FILE)

    @property
    def names(self) -> list[str]:
        """Names of the SAEs."""
        return self.saes["sae"].tolist()

    @cached_property
    def _features(self) -> pd.DataFrame:
        return self.read_table(FEATURES_FILE)

    def features(self, sae: str | None = None) -> pd.DataFrame:
        """Return the table of all features, or of one SAE's, one row a feature."""
        if sae is None:
            return self._features.copy()
        return self._features.query("sae == @name", local_dict={"name": self._known(sae)}).reset_index(drop=True)

    def examples(self, sae: str, feature: int, group: str | None = None) -> pd.DataFrame:
        """Return the examples of one feature, all groups or one ("top", "q0", …), strongest first in each."""
        found = self._rows_of(EXAMPLES_FILE, sae, feature)
        return found if group is None else found.query("group == @group").reset_index(drop=True)

    def logit_effects(self, sae: str, feature: int) -> pd.DataFrame:
        """Return the tokens that a feature promotes and suppresses most; empty if its hook point writes no logits."""
        return self._rows_of(EFFECTS_FILE, sae, feature)

    def decoder_norms(self, sae: str) -> pd.DataFrame:
        """Return how strongly each feature of a crosscoder writes at each hook point; empty for any other SAE.

        One row a feature and hook point: `norm` on raw activations, `scaled_norm` on normalised ones, and `share` of
        the feature's scaled norms: what tells shared features from those of one layer or model.
        """
        name = self._known(sae)
        if NORMS_FILE not in self.manifest.files:
            return no_decoder_norms()
        return pq.read_table(self.file(NORMS_FILE), filters=[("sae", "=", name)]).to_pandas()

    def histogram(self, sae: str, feature: int) -> Histogram:
        """Return the histogram of one feature's activations."""
        self._check(sae, feature)
        counts, edges = (self._histograms[f"{sae}.{part}"][feature].numpy() for part in ("counts", "edges"))
        return Histogram(counts, edges)

    def latents(self, sae: str, feature: int) -> pd.DataFrame:
        """Return every firing of one feature (`row`, `activation`), by row; reads little more than these.

        Raises ArtifactNotFoundError if the features were scored with `keep_latents=false`.
        """
        self._check(sae, feature)
        folder = f"{LATENTS_FOLDER}/{sae}/"
        paths = [self.file(name) for name in sorted(self.manifest.files) if name.startswith(folder)]
        if not paths:
            raise ArtifactNotFoundError(f"{self.id} has no latents. Run its recipe with features.keep_latents=true.")
        columns, filters = ["row", "activation"], [("feature", "=", feature)]
        parts = [pq.read_table(path, columns=columns, filters=filters).to_pandas() for path in paths]
        return pd.concat(parts, ignore_index=True)

    def text(self, sae: str, feature: int, n: int = 10) -> str:
        """Return the top examples as lines of text, the token on which the feature fires in «guillemets»."""
        lines: list[str] = []
        for example in self.examples(sae, feature, "top").head(n).to_dict("records"):
            tokens = [str(token).replace("\n", "↵") for token in example["tokens"]]
            here = example["pos"] - example["first_pos"]
            line = f"{''.join(tokens[:here])}«{tokens[here]}»{''.join(tokens[here + 1 :])}"
            lines.append(f"{example['activation']:8.3f}  {line}")
        return "\n".join(lines)

    @cached_property
    def _histograms(self) -> dict[str, Tensor]:
        return self.read_tensors(HISTOGRAMS_FILE)

    def _rows_of(self, name: str, sae: str, feature: int) -> pd.DataFrame:
        """Read the rows of one feature; the files are sorted, so only a few row groups are touched."""
        self._check(sae, feature)
        return pq.read_table(self.file(name), filters=[("sae", "=", sae), ("feature", "=", feature)]).to_pandas()

    def _check(self, sae: str, feature: int) -> None:
        d_sae = int(self.saes["d_sae"].to_numpy()[self.names.index(self._known(sae))])
        if not 0 <= feature < d_sae:
            raise IndexError(f"feature {feature} of {sae}, which has features 0 to {d_sae - 1}")

    def _known(self, sae: str) -> str:
        if sae not in self.names:
            raise ArtifactNotFoundError(
                f"{self.id} has no SAE {sae!r}.{near_names(sae, self.names)} It has: {', '.join(self.names)}."
            )
        return sae

    def __repr__(self) -> str:
        """Name the artifact and say of each SAE how its features fire."""
        lines = [
            f"  {row['sae']}: {row['d_sae']:,} features on {row['hook']}, {row['dead_fraction']:.1%} dead, "
            f"L0 {row['l0']:.1f}, median density {row['median_density']:.2g}"
            for row in self.saes.to_dict("records")
        ]
        return "\n".join([super().__repr__(), *lines])

    def _repr_html_(self) -> str:
        return super()._repr_html_() + self.saes.to_html(index=False)
