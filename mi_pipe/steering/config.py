"""What can be chosen about steering: directions, coefficients, what is measured, what is written."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from mi_pipe.core.config import Config, Execution
from mi_pipe.patching.metrics import metric_source
from mi_pipe.steering.batches import BATCH_TOKENS
from mi_pipe.steering.contrast import Position

Texts = Annotated[tuple[str, ...], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
_SOURCES = ("contrast", "probe", "feature")


class ContrastConfig(Config):
    """Two sets of prompts, whose mean activations are subtracted: texts, or conditions on the prompts of a set."""

    positive: str | Texts
    """Texts, or a condition on prompts such as "role == 'clean'": the direction points to their mean."""
    negative: str | Texts
    """Texts, or a condition, as `positive` is: the direction points away from their mean."""
    prompts: str | None = None
    """Of conditions: the name of one of the recipe's tasks, or `prompts` for its section of this name."""
    position: Position = "last"
    """last: the last token of each prompt; all: every token but BOS."""
    max_prompts: PositiveInt | None = 256
    """Of conditions: at most so many prompts a side, the first; null for all."""
    prepend_bos: bool = True
    """Of texts: whether they begin with BOS, where the model has one."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> "ContrastConfig":
        if isinstance(self.positive, str) != isinstance(self.negative, str):
            raise ValueError("positive and negative are both lists of texts, or both conditions")
        if isinstance(self.positive, str) != (self.prompts is not None):
            raise ValueError("conditions need the prompts they are on (`prompts`), and lists of texts have none")
        return self


class ProbeDirectionConfig(Config):
    """A linear probe, at the direction's hook point."""

    label: str
    """What it reads."""
    position: str | None = None
    """Where it reads it; null for the probes' only position, or last."""

    def position_of(self, known: Sequence[str]) -> str:
        """Return where the probe reads, given at which positions there are probes."""
        return self.position or (known[0] if len(known) == 1 else "last")


class FeatureDirectionConfig(Config):
    """A feature of an SAE."""

    sae: str
    """The SAE's name, such as L15.resid_post.topk.k32.d4608.s0."""
    index: NonNegativeInt
    """The feature's number."""


class DirectionConfig(Config):
    """A direction: just one of contrast, probe and feature."""

    hook: str | None = None
    """Hook point; of a feature the SAE's own (of a crosscoder one of them)."""
    contrast: ContrastConfig | None = None
    """The difference of two means."""
    probe: ProbeDirectionConfig | None = None
    """Along which a probe's reading grows."""
    feature: FeatureDirectionConfig | None = None
    """A feature's decoder row."""
    scale: Literal["natural", "norm"] | PositiveFloat = "natural"
    """Length of coefficient 1. natural: distance of the means, deviation along a probe, a feature's largest activation;
    norm: mean norm of activations; or a number."""

    @model_validator(mode="after")
    def _one_source(self) -> "DirectionConfig":
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a direction has one of contrast, probe and feature, not {' and '.join(given) or 'none'}")
        if self.hook is None and self.feature is None:
            raise ValueError(f"a direction from a {given[0]} needs its hook point (`hook`)")
        return self

    @property
    def measures_scale(self) -> bool:
        """Say whether the scale is measured on prompts."""
        return self.scale == "norm" or (self.scale == "natural" and self.feature is not None)


class PerplexityConfig(Config):
    """Loss on the recipe's prompts, without any that has the tokens of a contrast's."""

    n_prompts: PositiveInt = 64
    """So many prompts, a random choice; 64 windows of 128 tokens are 8,128 predicted tokens."""
    seed: NonNegativeInt = 0
    """Which prompts these are."""


class GenerationConfig(Config):
    """Continuations of a few prompts."""

    prompts: Texts | None = None
    """Texts; null for the clean prompts of the first task, or else beginnings of the held-out prompts."""
    n_prompts: PositiveInt = 4
    """So many, where no texts are given."""
    prompt_tokens: PositiveInt = 16
    """Tokens of the beginnings of held-out prompts."""
    prepend_bos: bool = True
    """Of texts: whether they begin with BOS, where the model has one."""
    n_tokens: PositiveInt = 32
    """New tokens, fewer where the model ends its text."""
    n_samples: NonNegativeInt = 1
    """Sampled continuations of each prompt and coefficient, beside the greedy one."""
    temperature: PositiveFloat = 1.0
    """Of sampling."""
    seed: NonNegativeInt = 0
    """Of sampling; every coefficient gets the same random numbers."""


class SteeringConfig(Config):
    """Which directions are added to activations, how strongly, and what is looked at."""

    directions: Annotated[dict[Name, DirectionConfig], Field(min_length=1)]
    """Directions by a name of your choice."""
    coefficients: Annotated[tuple[float, ...], Field(min_length=1)] = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
    """Multiples of each direction's scale; 0, the model as it is, is always among them."""
    positions: Literal["all", "end"] = "all"
    """all: at every position; end: of prompts with an answer or a continuation, from the last token on."""
    metric: str = "logit_diff"
    """logit_diff, probability, prob_diff, loss, kl, module:callable of (logits, pairs); on the tasks' clean prompts."""
    max_pairs: PositiveInt | None = 32
    """Pairs of each task, the first; null for all."""
    n_random: NonNegativeInt = 1
    """So many random directions beside each, with steps of the same length: what any push of that length does."""
    seed: NonNegativeInt = 0
    """Of the random directions."""
    perplexity: PerplexityConfig | None = PerplexityConfig()
    """Loss on text, where the recipe has prompts; null for none."""
    generation: GenerationConfig | None = GenerationConfig()
    """Texts written under steering (not for random directions); null for none."""
    tasks: Annotated[list[str] | None, Execution()] = None
    """Names of the recipe's tasks whose metric is read; null for all."""
    probes: Annotated[str | None, Execution()] = None
    """Id of probes that are there, instead of those of the recipe's section."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    batch_tokens: Annotated[PositiveInt, Execution()] = BATCH_TOKENS
    """Tokens of one forward pass: prompts times coefficients times their length."""

    @field_validator("coefficients")
    @classmethod
    def _each_once(cls, coefficients: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({*coefficients, 0.0}))

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result; a metric of one's own counts with its source."""
        source = metric_source(self.metric)
        return super().identity() | ({} if source is None else {"metric_source": source})

    @property
    def contrast_sets(self) -> list[str]:
        """Names of the prompt sets that contrasts choose from, each once, sorted: the order of the stage's inputs."""
        named = [item.contrast.prompts for item in self.directions.values() if item.contrast is not None]
        return sorted({name for name in named if name is not None})
