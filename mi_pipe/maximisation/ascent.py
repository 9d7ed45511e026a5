"""Gradient-based input maximisation: embeddings are moved so that a neuron, head, direction or feature grows.

The last `n_pos` embeddings of an input are free, after a fixed prefix. Ascent climbs the target's value at the last
position, or its mean over the free ones, with every embedding held at the median norm of the model's own (`sphere.py`):
ever longer vectors raise most values and mean nothing. The learning rate is a share of that norm and falls to 0 by a
cosine. Restarts begin at random tokens and run as one batch; of each the best embeddings on the way are kept, so none
ends below its start.

What ascent finds between tokens is no text. So the tokens nearest to each position (cosine) are listed, inputs of just
the nearest are run on the way, and the best of them stands beside the embeddings with its own activation: most of what
ascent gains is commonly lost there. From the best tokens seen on, single ones are exchanged (`swaps.py`); with
`n_steps=0` that is all, and with `start` it begins at inputs of yours, such as the largest of a data set.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, ValidationError
from torch import Tensor

from mi_pipe.core.config import Config
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.maximisation.found_inputs import FoundInputs
from mi_pipe.maximisation.running import Objective, check_readable, token_embeddings
from mi_pipe.maximisation.sphere import SphereAscent
from mi_pipe.maximisation.swaps import Swaps
from mi_pipe.maximisation.targets import Target
from mi_pipe.maximisation.tokens import nearest_tokens, usable_tokens
from mi_pipe.models.model import Model


class AscentConfig(Config):
    """How inputs are searched for."""

    n_pos: int = Field(default=8, ge=1)
    """Positions that are free; with `start` as many as its rows have."""
    at: Literal["last", "mean"] = "last"
    """Whether the value at the last position grows, or the mean over the free ones."""
    n_steps: int = Field(default=200, ge=0)
    """Steps of ascent; 0 for exchanges of tokens alone."""
    lr: float = Field(default=0.1, gt=0)
    """First learning rate, as a share of the embeddings' norm."""
    n_restarts: int = Field(default=4, ge=1)
    """Random beginnings; with `start` one a row of it."""
    check_every: int = Field(default=10, ge=1)
    """After how many steps the nearest tokens are run."""
    n_swaps: int = Field(default=20, ge=0)
    """Rounds of exchanging single tokens after the ascent."""
    n_candidates: int = Field(default=64, ge=1)
    """Exchanges that are run in a round."""
    n_top: int = Field(default=256, ge=1)
    """They are among so many tokens of largest first-order effect at each position."""
    n_near: int = Field(default=5, ge=1)
    """Nearest tokens listed for each position."""
    seed: int = Field(default=0, ge=0)
    """Seed of beginnings and exchanges."""


def maximise_input(
    model: Model,
    target: Target,
    *,
    prefix: str | Sequence[int] | None = None,
    start: Sequence[Sequence[int]] | None = None,
    **options: object,
) -> FoundInputs:
    """Return the inputs found for a target; `options` are fields of `AscentConfig`.

    The prefix is tokens, or a text that is put after the model's BOS if it has one; by default BOS alone. `start` has
    the tokens to begin with, rows of one length. Raises ConfigError or HookPointError for what the model does not have,
    or for more positions than it takes.
    """
    config = _checked(options)
    check_readable(model, target)
    fixed = _prefix_tokens(model, prefix)
    table = token_embeddings(model)
    usable = usable_tokens(model.vocabulary, len(table))
    tokens = _random_tokens(config, usable) if start is None else _given_tokens(start, len(table))
    n_pos = tokens.shape[1]
    if len(fixed) + n_pos > model.info.n_ctx:
        raise ConfigError(
            f"The prefix has {len(fixed)} tokens and {n_pos} are free; the model takes {model.info.n_ctx}."
        )
    objective = Objective(model, target, torch.tensor(fixed, device=model.device).long(), n_pos, config.at)
    climb = _Climb(objective, table, usable, config, tokens.to(model.device))
    climb.run()
    swaps = Swaps(objective, table, usable, config.n_candidates, config.n_top, config.seed)
    best = swaps.improved(climb.tokens, config.n_swaps)
    return _found(objective, climb, best, nearest_tokens(climb.embeddings, table, usable, config.n_near))


def _checked(options: dict[str, object]) -> AscentConfig:
    try:
        return AscentConfig.model_validate(options)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        if wrong["type"] == "extra_forbidden":
            known = list(AscentConfig.model_fields)
            near = near_names(name, known) or f" There are {', '.join(known)}."
            raise ConfigError(f"maximise_input has no option {name!r}.{near}") from None
        raise ConfigError(f"maximise_input: {name} is {wrong['input']!r}; {wrong['msg'].lower()}.") from None


def _random_tokens(config: AscentConfig, usable: Bool[Tensor, " d_vocab"]) -> Int[Tensor, "restart pos"]:
    known = usable.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(config.seed)
    return known[torch.randint(len(known), (config.n_restarts, config.n_pos), generator=generator)]


def _given_tokens(start: Sequence[Sequence[int]], n_tokens: int) -> Int[Tensor, "restart pos"]:
    lengths = {len(row) for row in start}
    if len(lengths) != 1 or not min(lengths):
        raise ConfigError(
            f"start has rows of {', '.join(map(str, sorted(lengths))) or 'no'} tokens; one length is needed."
        )
    tokens = torch.tensor([[int(token) for token in row] for row in start])
    if tokens.min() < 0 or tokens.max() >= n_tokens:
        raise ConfigError(
            f"start has tokens {int(tokens.min())} to {int(tokens.max())}; the model's are 0 to {n_tokens - 1}."
        )
    return tokens


def _prefix_tokens(model: Model, prefix: str | Sequence[int] | None) -> list[int]:
    if prefix is not None and not isinstance(prefix, str):
        return [int(token) for token in prefix]
    bos = [] if model.vocabulary.bos_id is None else [model.vocabulary.bos_id]
    return bos if prefix is None else [*bos, *model.vocabulary.encode(prefix)]


class _Climb:
    """The state of an ascent: the best embeddings and the best tokens of each restart so far."""

    def __init__(
        self,
        objective: Objective,
        table: Float[Tensor, "d_vocab d_model"],
        usable: Bool[Tensor, " d_vocab"],
        config: AscentConfig,
        tokens: Int[Tensor, "restart pos"],
    ) -> None:
        self._objective, self._table, self._usable, self._config = objective, table, usable, config
        self.tokens = tokens
        self._value_of_tokens = objective.of_tokens(self.tokens).detach()
        self._ascent = SphereAscent(table[self.tokens], float(table[usable].norm(dim=1).median()))
        self.embeddings = self._ascent.vectors
        self.value = torch.full((len(tokens),), -torch.inf, device=table.device)
        self.curve: list[Float[np.ndarray, " restart"]] = []

    def run(self) -> None:
        """Take all steps."""
        config, ascent = self._config, self._ascent
        for step in range(config.n_steps + 1):
            now = ascent.vectors.clone().requires_grad_()
            value = self._objective.of_embeddings(now)
            self._note(ascent.vectors, value.detach())
            if step % config.check_every == 0 or step == config.n_steps:
                self._note_tokens(ascent.vectors)
            if step < config.n_steps:
                (gradient,) = torch.autograd.grad(value.sum(), now)
                ascent.step(gradient, config.lr * (1 + math.cos(math.pi * step / config.n_steps)) / 2)
        self._note_tokens(self.embeddings)

    def _note(self, embeddings: Float[Tensor, "restart pos d_model"], value: Float[Tensor, " restart"]) -> None:
        self.curve.append(value.cpu().numpy())
        better = value > self.value
        self.embeddings = torch.where(better[:, None, None], embeddings, self.embeddings)
        self.value = torch.where(better, value, self.value)

    @torch.no_grad()
    def _note_tokens(self, embeddings: Float[Tensor, "restart pos d_model"]) -> None:
        tokens = nearest_tokens(embeddings, self._table, self._usable)[1][..., 0]
        value = self._objective.of_tokens(tokens)
        better = value > self._value_of_tokens
        self.tokens = torch.where(better[:, None], tokens, self.tokens)
        self._value_of_tokens = torch.where(better, value, self._value_of_tokens)


def _found(
    objective: Objective,
    climb: _Climb,
    tokens: Int[Tensor, "restart pos"],
    nearest: tuple[Float[Tensor, "restart pos near"], Int[Tensor, "restart pos near"]],
) -> FoundInputs:
    """Read the target at what was found, and take everything to the host."""
    cosines, near = nearest
    with torch.no_grad():
        value_of_tokens = objective.of_tokens(tokens)
    text_of = objective.model.vocabulary.text
    return FoundInputs(
        target=objective.target.name,
        prefix="".join(map(text_of, objective.prefix.tolist())),
        curve=np.stack(climb.curve, axis=1),
        embeddings=climb.embeddings.cpu(),
        soft=climb.value.cpu().numpy(),
        soft_activation=objective.activation_of_embeddings(climb.embeddings).cpu().numpy(),
        nearest_activation=objective.activation_of_tokens(near[..., 0]).cpu().numpy(),
        token_ids=tokens.cpu().numpy(),
        tokens=value_of_tokens.cpu().numpy(),
        tokens_activation=objective.activation_of_tokens(tokens).cpu().numpy(),
        near_ids=near.cpu().numpy(),
        near_cosines=cosines.cpu().numpy(),
        text_of=text_of,
    )
