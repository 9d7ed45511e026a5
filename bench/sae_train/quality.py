"""FVU at equal L0 on held-out activations after the same tokens in the same order: ours beside SAELens, both TopK.

python -m bench.sae_train --quality STORE_ID [--store ROOT] [--hook HOOK] [--tokens N] [--peer saelens=PYTHON]

Ours with the defaults of the train_saes stage. SAELens with its defaults, the activations scaled to its liking
(`normalize_activations="expected_average_only_in"`, as its documentation trains), at its default learning rate and,
since rates suit lengths of training, at any others that --peer-lr names; each has its own line. The FVU is over the
held-out rows, against their own mean, by the same code for all. With --bfloat16 there is ours with the encoder's
product in bfloat16 too.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from mi_pipe.activations.store import ActivationStore
from mi_pipe.activations.training.shuffled import ShuffledReader
from mi_pipe.core.store import Store
from mi_pipe.saes.building import build_trainer
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.held_out import HeldOut
from mi_pipe.saes.kernels import Precision
from mi_pipe.saes.metrics import StreamingFVU
from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.sweep import SAESpec
from mi_pipe.saes.training import TrainingGroup

_HELD_OUT_ROWS = 32_768
_LOG_CHARACTERS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--quality", metavar="STORE_ID", help="compare FVU on the activations of this harvest instead")
    parser.add_argument("--store", default="data/store", help="where that harvest lies")
    parser.add_argument("--hook", help="its hook point; the first by default")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to train on")
    parser.add_argument("--peer-lr", type=float, action="append", default=[], help="learning rate of the peer")


def figures(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield one dict a training."""
    store = ActivationStore(Store(args.store).folder(Store(args.store).find(args.quality)))
    subject = Subject(store, args.hook or store.hooks[0], args.tokens)
    precisions: list[Precision] = ["float32", "bfloat16"] if args.bfloat16 else ["float32"]
    ours = [subject.train(precision) for precision in precisions]
    yield from ours
    for _, python in args.peer:
        for lr in args.peer_lr or [None]:
            theirs = subject.train_saelens(python, lr, folder)
            yield {**theirs, "fvu_of_peer": round(ours[0]["fvu"] / theirs["fvu"], 4)}


class Subject:
    """The rows to train on and those to measure on."""

    def __init__(self, store: ActivationStore, hook: str, n_tokens: int) -> None:
        self._store = store
        self._config = TrainSAEsConfig(n_tokens=n_tokens, device="cpu")
        self._sites = Sites.of_sae(hook, store.width(hook))
        self._hook = hook
        self._held_out = HeldOut(store, self._config, None).sample(self._sites, _HELD_OUT_ROWS).x

    def train(self, precision: Precision) -> dict[str, Any]:
        """Train ours."""
        config, hook = self._config, self._hook
        assert isinstance(config.d_sae, int)
        assert isinstance(config.k, int)
        spec = SAESpec(self._sites, "topk", config.k, config.d_sae, 0)
        trainer = build_trainer(config, spec, precision, torch.device("cpu"))
        found = self._store.statistics(hook)
        normaliser = Normaliser.from_moments(torch.from_numpy(found.mean), found.mean_square_norm_centred, hook)
        group = TrainingGroup(self._sites, {hook: normaliser}, {"sae": trainer}, config.log_steps)
        for step, batch in enumerate(self._reader().batches(0, config.n_steps)):
            group.step(batch, step)
        _, sae = next(iter(group.folded()))
        with torch.no_grad():
            codes = [(x, sae.encode(x)) for x in self._held_out.split(config.batch_rows)]
            pairs = [(x, sae.decode(z), int(torch.count_nonzero(z))) for x, z in codes]
        return {"trainer": "ours", "encoder": precision, **self._figures(pairs)}

    def train_saelens(self, python: str, lr: float | None, folder: Path) -> dict[str, Any]:
        """Train SAELens' in its own python."""
        paths = self._saved_rows(folder)
        sizes = {name: getattr(self._config, name) for name in ("d_sae", "k", "batch_rows", "n_steps")}
        options = {**paths, **sizes, "lr": lr, "n_threads": torch.get_num_threads()}
        script = Path(__file__).with_name("saelens_quality_runner.py")
        command = [python, str(script), json.dumps(options)]
        environment = {**os.environ, "WANDB_MODE": "disabled"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"SAELens ended: {done.stderr[-_LOG_CHARACTERS:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        reconstruction = torch.from_numpy(np.load(paths["reconstruction"]))
        pairs = [(self._held_out, reconstruction, answer["n_active"])]
        return {"trainer": "saelens", "lr": answer["lr"], **self._figures(pairs)}

    def _reader(self) -> ShuffledReader:
        return ShuffledReader(self._store, [self._hook], self._config.batch_rows)

    def _saved_rows(self, folder: Path) -> dict[str, str]:
        """Write the rows that ours are trained on, in their order, and the held-out ones."""
        paths = {name: str(folder / f"{name}.npy") for name in ("rows", "held_out", "reconstruction")}
        if not Path(paths["rows"]).exists():
            n_batch = self._config.batch_rows
            shape = (self._config.n_steps * n_batch, self._held_out.shape[1])
            rows = open_memmap(paths["rows"], "w+", np.float32, shape)
            for step, batch in enumerate(self._reader().batches(0, self._config.n_steps)):
                rows[step * n_batch : (step + 1) * n_batch] = batch[self._hook].numpy()
            rows.flush()
            np.save(paths["held_out"], self._held_out.numpy())
        return paths

    def _figures(self, pairs: list[tuple[Tensor, Tensor, int]]) -> dict[str, Any]:
        fvu = StreamingFVU(self._held_out.shape[1], torch.device("cpu"))
        for x, reconstruction, _ in pairs:
            fvu.update(x, reconstruction)
        l0 = sum(n_active for *_, n_active in pairs) / len(self._held_out)
        return {
            "fvu": round(fvu.value(), 5),
            "l0": round(l0, 2),
            "tokens": self._config.n_steps * self._config.batch_rows,
        }
