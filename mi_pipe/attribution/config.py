"""What can be chosen about attribution."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mi_pipe.attribution.nodes import Kind
from mi_pipe.attribution.path_nodes import MLPs
from mi_pipe.circuits.eap import Convention
from mi_pipe.core.config import Config, Execution
from mi_pipe.patching.metrics import Direction, metric_source

Method = Literal["atp", "atp_qk_fix", "atp_star", "ig_inputs", "ig_activations"]
DEFAULT_KINDS: tuple[Kind, ...] = ("embed", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")


class VerifyConfig(Config):
    """Which nodes are patched exactly, to be set beside their estimates; each at all positions."""

    top: NonNegativeInt = 10
    """So many of each kind, the largest by mean absolute effect; 0 for none."""
    random: NonNegativeInt = 10
    """And so many of each kind at random from the others, so that misses show; without top none are patched."""
    seed: NonNegativeInt = 0
    """Seed of the random ones."""


class PathConfig(Config):
    """Path patching from many senders, each alone, into some receivers together."""

    receivers: Annotated[tuple[str, ...], Field(min_length=1)] = ("logits",)
    """logits alone, or any of a9.h6.q, a9.kv1.k, a9.kv1.v (a9.h6.k without grouped queries), m9."""
    senders: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """embed, heads (a3.h5) and MLPs (m3); null for all heads and MLPs up to the last receiver's layer."""
    mlps: MLPs = "recomputed"
    """recomputed: paths may go through MLPs; frozen: MLPs are held at what they are without a patch."""


class AttributionConfig(Config):
    """To which nodes, and how, a metric is attributed."""

    kinds: Annotated[list[Kind], Field(min_length=1, default_factory=lambda: list(DEFAULT_KINDS))]
    """embed, resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, neuron; those the model has."""
    method: Method = "atp"
    """atp; atp_qk_fix: softmax recomputed for q and k; atp_star: that and GradDrop; ig_inputs, ig_activations."""
    direction: Direction = "denoising"
    """denoising: clean values into the corrupted run; noising: corrupted values into the clean run."""
    metric: str = "logit_diff"
    """logit_diff, probability, prob_diff, loss, kl, or module:callable of (logits, pairs), differentiable."""
    ig_steps: PositiveInt = 5
    """Points of integrated gradients."""
    ig_convention: Convention = "midpoint"
    """Where they lie from corrupted (0) to clean (1): left k/m, k = 0..m-1; right k = 1..m; midpoint (k + 1/2)/m."""
    max_pairs: PositiveInt | None = 32
    """Pairs, the first of the task; null for all."""
    verify: VerifyConfig = VerifyConfig()
    """Which nodes are patched exactly."""
    paths: tuple[PathConfig, ...] = ()
    """Path patching, if any."""
    tasks: Annotated[list[str] | None, Execution()] = None
    """Names of the recipe's tasks; null for all."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    batch_pairs: Annotated[PositiveInt, Execution()] = 16
    """Pairs of one batch: a forward pass whose activations are kept for the backward pass."""
    batch_rows: Annotated[PositiveInt, Execution()] = 64
    """Prompts of one forward pass of exact and path patching."""

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result; a metric of one's own counts with its source."""
        source = metric_source(self.metric)
        return super().identity() | ({} if source is None else {"metric_source": source})
