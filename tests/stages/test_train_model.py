import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.trained import native_module
from mi_pipe.models.training import OptimizerConfig, Trainer
from mi_pipe.opening import open_artifact
from mi_pipe.prompts.repeated import repeated_tokens
from stages.train_model import STAGE, Inputs, RepeatedDataConfig, ToyConfig, TrainModelConfig, _batch_at

SMALL = {
    "model": {"d_model": 16, "n_heads": 2, "d_vocab": 16, "n_ctx": 24},
    "data": {"min_length": 12, "max_length": 24, "min_period": 3, "max_period": 8},
    "optimizer": {"batch_rows": 8, "n_warmup": 5},
}


def _config(**changes) -> TrainModelConfig:
    return TrainModelConfig.model_validate({**SMALL, **changes})


def test_a_trained_model_opens_loads_and_has_a_loss_curve(store):
    result = execute(STAGE, _config(n_steps=30, checkpoint_every=7), Inputs(), store)
    model = open_artifact(result.artifact.id, store).load("cpu")
    curve = result.artifact.read_table("training.parquet")
    assert curve["step"].tolist() == list(range(1, 31))
    assert curve.dtypes.astype(str).tolist() == ["int32", "float32", "float32"]
    assert curve["loss"].iloc[-5:].mean() < curve["loss"].iloc[:5].mean()
    logits = model.logits(torch.zeros(1, 5, dtype=torch.int64))
    assert logits.shape == (1, 5, 16)
    assert result.artifact.summary["steps"] == 30
    assert not store.scratch(result.artifact.id).exists()


def test_the_batch_of_a_step_depends_on_seed_and_step_alone():
    config = _config()
    first, again, later = (_batch_at(config, torch.device("cpu"), step) for step in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens)
    assert first.tokens.shape != later.tokens.shape or not torch.equal(first.tokens, later.tokens)
    for row, known in zip(first.tokens.tolist(), first.predictable.tolist(), strict=True):
        period = next(p for p in range(1, 24) if row[p:] == row[:-p])
        assert known == [target > period for target in range(1, len(row))]


def test_a_restored_trainer_takes_the_same_steps_bit_for_bit(tmp_path):
    config = _config(n_steps=12)

    def trainer():
        return Trainer(native_module(config.model.native_fields(0)), OptimizerConfig(batch_rows=8), 12)

    from functools import partial

    from mi_pipe.core.progress import Progress

    batch_at = partial(_batch_at, config, torch.device("cpu"))
    whole, first, second = trainer(), trainer(), trainer()
    whole.advance(batch_at, 12, Progress())
    first.advance(batch_at, 5, Progress())
    first.save(tmp_path / "checkpoint.safetensors")
    second.restore(tmp_path / "checkpoint.safetensors")
    second.advance(batch_at, 12, Progress())
    assert second.curve == whole.curve
    for name, weight in whole.module.state_dict().items():
        assert torch.equal(weight, second.module.state_dict()[name]), name


@pytest.mark.parametrize("n_kills", [1, pytest.param(4, marks=pytest.mark.storm)])
def test_a_killed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, n_kills):
    config = _config(n_steps=250 * n_kills, checkpoint_every=5)
    whole = execute(STAGE, config, Inputs(), Store(tmp_path / "whole")).artifact
    store = Store(tmp_path / "killed")
    for _ in range(n_kills):
        _killed_run(config, store, random.uniform(0.0, 0.2))
    finished = execute(STAGE, config, Inputs(), store)
    assert finished.outcome == "Resumed"
    for name in ("weights.safetensors", "training.parquet", "model_config.json"):
        assert file_sha256(finished.artifact.file(name)) == file_sha256(whole.file(name)), name
    assert finished.artifact.digest == whole.digest


_CHILD = """
import sys
import torch
torch.set_num_threads(1)
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from stages.train_model import STAGE, Inputs, TrainModelConfig
execute(STAGE, TrainModelConfig.model_validate_json(sys.argv[1]), Inputs(), Store(sys.argv[2]))
"""


def _killed_run(config: TrainModelConfig, store: Store, delay_s: float) -> None:
    """Start a run, wait until it has made new checkpoints, and kill it at a random moment."""
    ledgers = store.root / ".work"
    before = sum(path.stat().st_size for path in ledgers.glob("*/ledger.jsonl"))
    child = subprocess.Popen([sys.executable, "-c", _CHILD, config.model_dump_json(), str(store.root)])
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in ledgers.glob("*/ledger.jsonl")) <= before + 40:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(delay_s)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_sizes_that_do_not_fit_together_are_refused():
    with pytest.raises(ValidationError, match="even multiple of n_heads"):
        ToyConfig(d_model=64, n_heads=7)
    with pytest.raises(ValidationError, match="every sequence repeats"):
        RepeatedDataConfig(min_length=40, max_period=40)
    with pytest.raises(ValidationError, match=r"data.max_length 100 is more than model.n_ctx 64"):
        TrainModelConfig(model=ToyConfig(n_ctx=64))
    with pytest.raises(ValidationError, match=r"data.max_period 44 is more than model.d_vocab 32"):
        TrainModelConfig(model=ToyConfig(d_vocab=32))


def test_where_it_trains_and_how_often_it_saves_do_not_change_the_id():
    assert _config(checkpoint_every=1, device="cpu").identity() == _config(checkpoint_every=9).identity()


@pytest.mark.slow
def test_the_default_toy_has_previous_token_and_induction_heads(store):
    model = open_artifact(execute(STAGE, TrainModelConfig(), Inputs(), store).artifact.id, store).load("cpu")
    period = 40
    tokens = repeated_tokens(np.random.default_rng(1), np.arange(64), 2 * period, [period] * 32)
    _, cache = model.bridge.run_with_cache(torch.from_numpy(tokens).long())
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in (0, 1)]
    assert patterns[0].diagonal(-1, -2, -1).mean((0, 2)).max() > 0.8
    assert patterns[1].diagonal(1 - period, -2, -1).mean((0, 2)).max() > 0.8
