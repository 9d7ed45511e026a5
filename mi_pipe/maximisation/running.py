"""Runs a model as far as one hook point on tokens or on embeddings in their place, and reads a target there."""

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.activations.harvest.collecting import LastValueReachedError
from mi_pipe.core.errors import HookPointError
from mi_pipe.maximisation.targets import Target
from mi_pipe.models.lean import lean
from mi_pipe.models.model import Model
from mi_pipe.models.reading import listening

EMBEDDING = "hook_embed"


def check_readable(model: Model, target: Target) -> None:
    """Raise unless the plain model computes a target's hook point, has the target there, and embeds by one module."""
    site = model.hooks[target.hook]
    if site.reading is None:
        raise HookPointError(f"Hook point {target.hook!r} cannot be read on the plain model, which gradients need.")
    if model.hooks[EMBEDDING].module_path is None:
        raise HookPointError(f"Embeddings of {model.info.architecture} are not one module's output to replace.")
    target.check(site.width)


def token_embeddings(model: Model) -> Float[Tensor, "d_vocab d_model"]:
    """Return what each token of the vocabulary is embedded as, any scale included; float32."""
    module = model.submodule(model.hooks[EMBEDDING].module_path or "")
    n_tokens = min(model.vocabulary.size, model.info.d_vocab)
    return module(torch.arange(n_tokens, device=model.device)).float()


@dataclass(frozen=True, eq=False)
class Objective:
    """A target read at the last position of an input, or on average over its last `n_pos`, after a fixed prefix."""

    model: Model
    target: Target
    prefix: Int[Tensor, " prefix_pos"]
    n_pos: int
    at: Literal["last", "mean"]

    def of_embeddings(self, embeddings: Float[Tensor, "input pos d_model"]) -> Float[Tensor, " input"]:
        """Return what ascent follows, with a gradient to `embeddings`."""
        return self._read(self._rows(self._dummies(len(embeddings)), embeddings), climbed=True)

    def of_tokens(self, tokens: Int[Tensor, "input pos"]) -> Float[Tensor, " input"]:
        """Return the same of tokens."""
        return self._read(self._rows(self._with_prefix(tokens)), climbed=True)

    @torch.no_grad()
    def activation_of_embeddings(self, embeddings: Float[Tensor, "input pos d_model"]) -> Float[Tensor, " input"]:
        """Return the target's activation."""
        return self._read(self._rows(self._dummies(len(embeddings)), embeddings), climbed=False)

    @torch.no_grad()
    def activation_of_tokens(self, tokens: Int[Tensor, "input pos"]) -> Float[Tensor, " input"]:
        """Return the target's activation."""
        return self._read(self._rows(self._with_prefix(tokens)), climbed=False)

    def _dummies(self, n_inputs: int) -> Int[Tensor, "input all_pos"]:
        return self._with_prefix(torch.zeros(n_inputs, self.n_pos, dtype=torch.long, device=self.prefix.device))

    def _with_prefix(self, tokens: Int[Tensor, "input pos"]) -> Int[Tensor, "input all_pos"]:
        return torch.cat([self.prefix.expand(len(tokens), -1), tokens], dim=1)

    def _read(self, x: Float[Tensor, "input pos width"], climbed: bool) -> Float[Tensor, " input"]:
        reader = self.target.climbed if climbed else self.target.values
        return reader(x.flatten(0, 1)).view(x.shape[:2]).mean(1)

    def _rows(
        self, tokens: Int[Tensor, "input all_pos"], embeddings: Float[Tensor, "input pos d_model"] | None = None
    ) -> Float[Tensor, "input read_pos width"]:
        """Run the model up to the target's hook point; `embeddings` take the place of those of the last tokens."""
        reading = self.model.hooks[self.target.hook].reading
        assert reading is not None, "check_readable comes first"
        found: list[Tensor] = []

        def replace(value: Tensor) -> Tensor | None:
            if embeddings is None:
                return None
            return torch.cat([value[:, : -self.n_pos], embeddings.to(value.dtype)], dim=1)

        def keep(name: str, value: Tensor) -> None:
            found.append(value)
            raise LastValueReachedError(name)

        module = self.model.module
        with (
            contextlib.suppress(LastValueReachedError),
            lean(module) as options,
            self.model.edited({EMBEDDING: replace}),
            listening(module, {self.target.hook: reading}, keep),
        ):
            module(tokens, **options)
        n_read = 1 if self.at == "last" else self.n_pos
        return found[0].reshape(*tokens.shape, -1)[:, -n_read:].float()
