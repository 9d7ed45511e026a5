"""The benchmark of SAE training gives everyone the same steps, takes turns, and measures what it says."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench.sae_train
from bench.clock import timed
from bench.sae_train.__main__ import figures, parse
from bench.sae_train.peer import Peer
from bench.sae_train.quality import Subject
from bench.sae_train.rows import mixture
from bench.sae_train.subject import HOOK, Sizes, Training, store_of
from mi_pipe.core.store import Store

SIZES = Sizes(d_in=16, d_sae=64, k=4, batch_rows=128, n_steps=3)
FAKE_TRAINER = """
import time, pathlib
from turns import Turns
turns = Turns()
seen = []
for batch in turns.batches():
    time.sleep(0.02)
    seen.append(list(batch.shape))
pathlib.Path(turns.options["seen"]).write_text(str(seen))
"""


def test_every_figure_is_there(tmp_path):
    found = {}
    for figure in figures(parse(["--rounds", "1", "--sweep", "--bfloat16"]), SIZES, 2048, tmp_path):
        found |= figure
    assert {"of_floor", "bfloat16", "of_four_single_runs", "foreign_cores", "n_quiet_rounds"} < set(found)
    assert set(found["tokens_per_s"]) == {"floor", "ours", "ours_bfloat16", "sweep"}
    assert all(speed > 0 for speed in found["tokens_per_s"].values())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "standard"])
def test_a_turn_is_as_many_steps_of_training_as_asked(architecture, tmp_path):
    store = store_of(mixture(2048, SIZES.d_in), Store(tmp_path))
    training = Training(store, [architecture], SIZES)
    for _ in range(2):
        training.turn()
    state = training._group.state()
    training.close()
    (steps,) = {int(value) for name, value in state.items() if name.endswith("W_enc.step")}
    assert steps == 2 * SIZES.n_steps


def test_a_peer_works_in_its_turns_alone_and_tells_their_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(bench.sae_train.__file__).parent))
    (tmp_path / "fake.py").write_text(FAKE_TRAINER)
    np.save(tmp_path / "rows.npy", np.zeros((20, 3), np.float32))
    options = {"rows": str(tmp_path / "rows.npy"), "seen": str(tmp_path / "seen")}
    options |= {"n_threads": 1, "n_steps": 4, "batch_rows": 8}
    with Peer("fake", sys.executable, options, tmp_path, tmp_path / "fake.py") as peer:
        turns = [timed(peer.turn) for _ in range(3)]
    assert all(0.08 <= turn.wall < 1 for turn in turns)
    assert json.loads((tmp_path / "seen").read_text()) == 12 * [[8, 3]]


def test_a_peer_that_fails_says_why(tmp_path):
    (tmp_path / "broken.py").write_text("raise ValueError('no such trainer')")
    peer = Peer("broken", sys.executable, {}, tmp_path, tmp_path / "broken.py")
    with peer, pytest.raises(RuntimeError, match="no such trainer"):
        peer.turn()


def test_options_are_checked(capsys):
    with pytest.raises(SystemExit):
        parse(["--peer", "nobody=python"])
    assert "NAME=PYTHON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--architecture", "jumprelu", "--peer", f"sparsify={sys.executable}"])
    assert isinstance(parse([]), argparse.Namespace)


def test_quality_is_measured_on_rows_that_are_held_out(tmp_path):
    store = store_of(mixture(12_288, 16), Store(tmp_path))
    subject = Subject(store, HOOK, 8192)
    found = subject.train("float32")
    assert found["fvu"] > 0
    assert found["l0"] <= 32
    paths = subject._saved_rows(tmp_path)
    trained, held_out = (torch.from_numpy(np.load(paths[name])) for name in ("rows", "held_out"))
    assert trained.shape == (8192, 16)
    assert 400 < len(held_out) < 900
    assert not {row.numpy().tobytes() for row in trained} & {row.numpy().tobytes() for row in held_out}
