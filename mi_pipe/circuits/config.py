"""What can be chosen about circuits."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mi_pipe.circuits.curve import FRACTIONS
from mi_pipe.circuits.eap import EAP_ALPHAS, Convention, ig_alphas
from mi_pipe.circuits.prune import Rank, Selection
from mi_pipe.core.config import Config, Execution

Fraction = Annotated[float, Field(gt=0, le=1)]


class ScoreConfig(Config):
    """How edges are scored."""

    method: Literal["eap", "eap_ig"] = "eap"
    """eap: attribution patching with the clean run's gradient; eap_ig: with its mean from corrupted to clean inputs."""
    ig_steps: PositiveInt = 5
    """Points of eap_ig."""
    ig_convention: Convention = "left"
    """Where they lie: left k/m, k = 0..m-1 (the authors' code); right k = 1..m (their paper); midpoint (k + 1/2)/m."""
    max_pairs: PositiveInt | None = 32
    """Pairs that edges are scored and circuits measured on, the first of the task; null for all."""

    @property
    def alphas(self) -> tuple[float, ...]:
        """Where gradients are taken, from the corrupted (0) to the clean (1) embeddings."""
        return EAP_ALPHAS if self.method == "eap" else ig_alphas(self.ig_steps, self.ig_convention)


class CircuitsConfig(Config):
    """How edges are scored, which circuits are run, and which of them is reported."""

    scores: ScoreConfig = ScoreConfig()
    """How edges are scored."""
    rank: Rank = "absolute"
    """absolute: largest |score| first; signed: edges whose corruption lowers the metric most first."""
    selection: Selection = "top"
    """top: the n best edges; greedy: the best edge into what is already reached, from the logits backward."""
    n_edges: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Sizes of the faithfulness curve in edges, before pruning; null for `fractions`."""
    fractions: Annotated[tuple[Fraction, ...], Field(min_length=1)] = FRACTIONS
    """Sizes of the faithfulness curve as shares of all edges."""
    threshold: float = 0.85
    """The reported circuit is the smallest on the curve with at least this faithfulness, else the largest."""
    n_random: NonNegativeInt = 3
    """Random circuits of each size."""
    n_resamples: PositiveInt = 2000
    """Resamples of the pairs for the interval of faithfulness."""
    seed: NonNegativeInt = 0
    """Seed of random circuits and resamples."""
    tasks: Annotated[list[str] | None, Execution()] = None
    """Names of the recipe's tasks whose circuits are sought; null for all."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    batch_pairs: Annotated[PositiveInt, Execution()] = 16
    """Pairs of one batch; memory is about (heads + layers) * d_model * tokens of the batch * 4 bytes."""
