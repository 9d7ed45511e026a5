"""The two ends of a path: what sends and what receives, by names that people write.

| name | as sender | as receiver |
|---|---|---|
| embed | the embeddings | |
| a3.h5 | what head 5 of layer 3 reads (z), and so writes | |
| m3 | what the MLP of layer 3 writes | the same, computed from its input |
| a3.h5.q | | the head's query |
| a3.kv1.k, a3.kv1.v (a3.h5.k without grouped queries) | | a key/value head's keys, values |
| logits | | the last residual stream |
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from mi_pipe.attribution.nodes import Site
from mi_pipe.core.errors import ConfigError
from mi_pipe.models.info import ModelInfo

MLPs = Literal["recomputed", "frozen"]
"""Whether paths may go through MLPs."""
SenderKind = Literal["embed", "head", "mlp"]
ReceiverKind = Literal["q", "k", "v", "mlp", "logits"]
_SENDER = re.compile(r"embed|a(?P<attn>\d+)\.h(?P<head>\d+)|m(?P<mlp>\d+)")
_RECEIVER = re.compile(r"logits|a(?P<attn>\d+)\.(?:h|kv)(?P<head>\d+)\.(?P<part>[qkv])|m(?P<mlp>\d+)")
_SITES = {"embed": "embed", "head": "z", "mlp": "mlp_out"}


@dataclass(frozen=True)
class Sender:
    """What is patched with the donor's value."""

    kind: SenderKind
    layer: int = 0
    head: int = 0

    @classmethod
    def named(cls, name: str) -> "Sender":
        """Return the sender of a name; raises ConfigError for another.

        >>> Sender.named("a3.h5")
        Sender(kind='head', layer=3, head=5)
        """
        found = _SENDER.fullmatch(name)
        if found is None:
            raise ConfigError(f"{name!r} is no sender of a path. Senders are embed, heads (a3.h5) and MLPs (m3).")
        if found["attn"] is not None:
            return cls("head", int(found["attn"]), int(found["head"]))
        return cls("embed") if found["mlp"] is None else cls("mlp", int(found["mlp"]))

    @property
    def name(self) -> str:
        """Its name."""
        return {"embed": "embed", "head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}[self.kind]

    @property
    def site(self) -> Site:
        """Where its value lies."""
        return Site(_SITES[self.kind], self.layer)  # pyright: ignore[reportArgumentType]

    def columns(self, info: ModelInfo) -> slice:
        """Return which columns of the site's value are its."""
        return slice(self.head * info.d_head, (self.head + 1) * info.d_head) if self.kind == "head" else slice(None)

    def check(self, info: ModelInfo) -> None:
        """Raise ConfigError if the model has no such sender."""
        _check(self.name, self.layer, self.head, info.n_heads, info, is_mlp=self.kind == "mlp")


@dataclass(frozen=True)
class Receiver:
    """Where a path ends."""

    kind: ReceiverKind
    layer: int = 0
    head: int = 0
    """Query head of q, key/value head of k and v."""

    @classmethod
    def named(cls, name: str) -> "Receiver":
        """Return the receiver of a name; raises ConfigError for another.

        >>> Receiver.named("a3.kv1.k")
        Receiver(kind='k', layer=3, head=1)
        """
        found = _RECEIVER.fullmatch(name)
        if found is None:
            raise ConfigError(
                f"{name!r} is no receiver of a path. Receivers are logits, MLPs (m3), and a head's a3.h5.q, a3.kv1.k, "
                "a3.kv1.v."
            )
        if found["attn"] is not None:
            return cls(cast("ReceiverKind", found["part"]), int(found["attn"]), int(found["head"]))
        return cls("logits") if found["mlp"] is None else cls("mlp", int(found["mlp"]))

    @property
    def name(self) -> str:
        """Its name, for models with and without grouped queries."""
        if self.kind in ("logits", "mlp"):
            return "logits" if self.kind == "logits" else f"m{self.layer}"
        return f"a{self.layer}.{'h' if self.kind == 'q' else 'kv'}{self.head}.{self.kind}"

    def check(self, info: ModelInfo) -> None:
        """Raise ConfigError if the model has no such receiver."""
        n_heads = info.n_heads if self.kind == "q" else info.n_kv_heads
        _check(self.name, self.layer, self.head, n_heads, info, is_mlp=self.kind == "mlp")


def every_sender(info: ModelInfo) -> list[Sender]:
    """Return all heads and MLPs, by layer."""
    found: list[Sender] = []
    for layer in range(info.n_layers):
        found += [Sender("head", layer, head) for head in range(info.n_heads)]
        found += [] if info.attn_only else [Sender("mlp", layer)]
    return found


def check_path(senders: Sequence[Sender], receivers: Sequence[Receiver], info: ModelInfo) -> None:
    """Raise ConfigError for a path that does not exist."""
    if not senders or not receivers:
        raise ConfigError("A path needs at least one sender and one receiver.")
    if any(receiver.kind == "logits" for receiver in receivers) and len(receivers) > 1:
        raise ConfigError("The logits receive alone: set to what they were, they leave nothing to other receivers.")
    for node in (*senders, *receivers):
        node.check(info)


def _check(name: str, layer: int, head: int, n_heads: int, info: ModelInfo, *, is_mlp: bool) -> None:
    if layer >= info.n_layers:
        raise ConfigError(f"{name}: the model has layers 0 to {info.n_layers - 1}.")
    if head >= n_heads:
        raise ConfigError(f"{name}: a layer of the model has {n_heads} such heads, 0 to {n_heads - 1}.")
    if is_mlp and info.attn_only:
        raise ConfigError(f"{name}: the model has no MLPs.")
