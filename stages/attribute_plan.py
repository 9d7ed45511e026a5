"""What a run of the stage `attribute` will do, from the config, the prompts and the model's hook points alone."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mi_pipe.attribution.config import AttributionConfig, PathConfig
from mi_pipe.attribution.nodes import Kind, axes_of, n_layers_of, present_kinds
from mi_pipe.attribution.path_nodes import Receiver, Sender, check_path, every_sender
from mi_pipe.models.device import pick_device
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.source import ModelSource, source_hooks
from mi_pipe.patching.chunks import Chunk, check_fits, choose_pairs, chunks_of
from mi_pipe.patching.metrics import find_metric
from mi_pipe.prompts.prompt_set import PromptSet


@dataclass(frozen=True)
class Inputs:
    """A model and the task whose metric is attributed."""

    model: ModelSource
    task: PromptSet


@dataclass(frozen=True)
class Plan:
    """What will be done, known before any weight is read."""

    info: ModelInfo
    kinds: list[Kind]
    chunks: list[Chunk]
    paths: list[tuple[PathConfig, list[Sender], list[Receiver]]]
    verifies: bool

    @property
    def pairs(self) -> Int[np.ndarray, " pair"]:
        """Numbers of the pairs, in the order of the arrays."""
        return np.concatenate([chunk.group.pairs for chunk in self.chunks])

    @property
    def n_pos(self) -> int:
        """Tokens of the longest prompt."""
        return max(chunk.group.n_pos for chunk in self.chunks)

    @property
    def units(self) -> list[str]:
        """What is done for each chunk."""
        return ["attribution", *(["exact"] if self.verifies else []), *(f"path{i}" for i in range(len(self.paths)))]

    @property
    def keys(self) -> list[str]:
        """Every unit of work."""
        return [key_of(chunk, unit) for chunk in self.chunks for unit in self.units]

    @property
    def n_values(self) -> int:
        """Values of one pair."""
        sizes = {"pos": self.n_pos, "head": self.info.n_heads, "kv_head": self.info.n_kv_heads}
        sizes |= {"neuron": self.info.d_mlp or 0}
        counts: list[int] = [
            n_layers_of(kind, self.info) * int(np.prod([sizes[axis] for axis in axes_of(kind) if axis != "layer"]))
            for kind in self.kinds
        ]
        return sum(counts)


def make_plan(config: AttributionConfig, inputs: Inputs) -> Plan:
    """Return the plan; raises what is wrong with device, metric, prompts, nodes or paths."""
    pick_device(config.device)
    find_metric(config.metric)
    hooks, info = source_hooks(inputs.model)
    groups = choose_pairs(inputs.task.pair_groups(), config.max_pairs)
    check_fits(groups, info, inputs.task.id)
    kinds = present_kinds(config.kinds, hooks, info)
    paths = [(path, *_ends(path, info)) for path in config.paths]
    return Plan(info, kinds, chunks_of(groups, config.batch_pairs), paths, config.verify.top > 0)


def _ends(path: PathConfig, info: ModelInfo) -> tuple[list[Sender], list[Receiver]]:
    receivers = [Receiver.named(name) for name in path.receivers]
    senders = every_sender(info) if path.senders is None else [Sender.named(name) for name in path.senders]
    if path.senders is None and receivers[0].kind != "logits":
        last = max(receiver.layer for receiver in receivers)
        senders = [sender for sender in senders if sender.layer <= last]
    check_path(senders, receivers, info)
    return senders, receivers


def key_of(chunk: Chunk, unit: str) -> str:
    """Name a unit by the pairs it covers, so that another batch size never takes it for its own."""
    return f"{chunk.group.n_pos}tokens.{chunk.rows.start}-{chunk.rows.stop}.{unit}"
