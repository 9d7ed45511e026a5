"""Training, validation and test prompts: whole prompts, and of tasks whole pairs, whose prompts are nearly the same.

Test prompts of a store without pairs are those that `ActivationStore.held_out_prompts` holds out for everyone.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.probes.config import SplitConfig

PARTS = ("training", "validation", "test")
_STREAM = 0x9B0E
_PAIR = "pair"


@dataclass(frozen=True)
class Parts:
    """Some rows of a store by part."""

    training: Int[np.ndarray, " row"]
    validation: Int[np.ndarray, " row"]
    test: Int[np.ndarray, " row"]

    @property
    def all(self) -> Int[np.ndarray, " row"]:
        """The rows of the three parts after one another."""
        return np.concatenate([self.training, self.validation, self.test])


@dataclass(frozen=True)
class PromptSplit:
    """What each prompt of a store is for."""

    part: Int[np.ndarray, " prompt"]
    """Place in PARTS."""
    cluster: Int[np.ndarray, " prompt"]
    """Prompts of one cluster (a pair) are never parted, nor drawn apart by a bootstrap."""
    max_rows: int
    seed: int

    def parts(self, rows: Int[np.ndarray, " row"], prompt_idx: Int[np.ndarray, " row"]) -> Parts:
        """Return rows by part, at most `max_rows` of training and half as many of the others; ascending."""
        of_row = self.part[prompt_idx[rows]]
        return Parts(*(self._some(rows[of_row == i], i) for i in range(len(PARTS))))

    def _some(self, rows: Int[np.ndarray, " row"], part: int) -> Int[np.ndarray, " row"]:
        most = self.max_rows if part == 0 else max(1, self.max_rows // 2)
        if len(rows) <= most:
            return rows
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, _STREAM, part])))
        return np.sort(generator.choice(rows, most, replace=False))


def split_prompts(store: ActivationStore, config: SplitConfig) -> PromptSplit:
    """Part the prompts of a store; raises ConfigError if a part would be empty."""
    if _PAIR in store.prompts.columns:
        cluster = np.unique(store.prompts[_PAIR].to_numpy(), return_inverse=True)[1]
        part = _by_pair(config, cluster)
    else:
        cluster = np.arange(store.n_prompts)
        test = store.held_out_prompts(config.test_fraction, config.seed)
        either = store.held_out_prompts(config.test_fraction + config.validation_fraction, config.seed)
        part = np.where(test, 2, np.where(either, 1, 0))
    missing = [name for i, name in enumerate(PARTS) if not (part == i).any()]
    if missing:
        raise ConfigError(
            f"{store.id} has too few prompts ({store.n_prompts}): none is left for {' and '.join(missing)}."
        )
    return PromptSplit(part, cluster, config.max_rows, config.seed)


def _by_pair(config: SplitConfig, cluster: Int[np.ndarray, " prompt"]) -> Int[np.ndarray, " prompt"]:
    n = int(cluster.max()) + 1
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, _STREAM])))
    order = generator.permutation(n)
    n_test, n_validation = (max(1, round(share * n)) for share in (config.test_fraction, config.validation_fraction))
    of_pair = np.zeros(n, np.int64)
    of_pair[order[:n_test]] = 2
    of_pair[order[n_test : n_test + n_validation]] = 1
    return of_pair[cluster]
