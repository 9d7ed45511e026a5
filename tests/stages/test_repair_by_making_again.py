"""Repair of what is made again whole: every file comes back, byte for byte but for files of times."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mi_pipe
from mi_pipe.activations.harvest.capture import capture
from mi_pipe.circuits.config import CircuitsConfig, ScoreConfig
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import StageError
from mi_pipe.core.manifest import Manifest, read_manifest
from mi_pipe.core.stage import Stage, execute
from mi_pipe.core.store import Store
from mi_pipe.verifying import verify
from stages import circuits, import_activations, lenses, patch, probes, report, score_features, train_model, train_saes
from stages.probe_plan import ProbesConfig
from stages.repair.repair import repair
from tests.lenses.toy import lens_config, lens_inputs
from tests.stages.sae_toy import sae_inputs, toy_config
from tests.stages.scored_toy import CONFIG as SCORING
from tests.stages.scored_toy import scored_inputs
from tests.stages.test_repair import flip
from tests.stages.toys import toy_model, toy_task


def made_training(store: Store) -> tuple[Stage, object, object]:
    return train_saes.STAGE, toy_config(n_tokens=256 * 20, architecture="topk"), sae_inputs(store)


def made_features(store: Store) -> tuple[Stage, object, object]:
    return score_features.STAGE, SCORING, scored_inputs(store)


def made_patch(store: Store) -> tuple[Stage, object, object]:
    model = toy_model(store)
    config = patch.PatchConfig(max_pairs=4, device="cpu", batch_tokens=64)
    return patch.STAGE, config, patch.Inputs(model, toy_task(store, model))


def made_lenses(store: Store) -> tuple[Stage, object, object]:
    return lenses.STAGE, lens_config(max_prompts=2), lens_inputs(store)


def made_probes(store: Store) -> tuple[Stage, object, object]:
    read = lens_inputs(store)
    labels = {"low": {"where": "token_id < 32"}, "place": {"column": "pos", "kind": "regression"}}
    chosen = {"positions": ["all"], "fit": {"l2": [0.1]}, "causal": {"amounts": [2.0], "max_prompts": 2}}
    config = ProbesConfig.model_validate({"labels": labels, **chosen, "device": "cpu"})
    return probes.STAGE, config, probes.Inputs(read.activations, read.model, read.prompts)


def made_circuit(store: Store) -> tuple[Stage, object, object]:
    model = toy_model(store, attn_only=False)
    scores = ScoreConfig(max_pairs=4)
    config = CircuitsConfig(scores=scores, fractions=(0.2, 1.0), n_random=1, n_resamples=50, device="cpu")
    return circuits.STAGE, config, circuits.Inputs(model, toy_task(store, model))


def made_model(store: Store) -> tuple[Stage, object, object]:
    small = {"model": {"d_model": 16, "n_heads": 2, "d_vocab": 64}, "data": {"min_length": 60}}
    config = train_model.TrainModelConfig.model_validate({"n_steps": 4, **small, "device": "cpu"})
    return train_model.STAGE, config, train_model.Inputs()


def made_import(store: Store) -> tuple[Stage, object, object]:
    store.root.mkdir(parents=True, exist_ok=True)
    file, table = store.root / "acts.npy", store.root / "tokens.csv"
    np.save(file, np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32))
    pd.DataFrame({"prompt_idx": np.repeat(range(30), 10), "pos": np.tile(range(10), 30), "token_id": 3}).to_csv(table)
    config = import_activations.ImportConfig(files=(file,), tokens=table, hooks={"mine": ""}, shard_rows=64)
    return import_activations.STAGE, config, import_activations.Inputs()


def made_report(store: Store) -> tuple[Stage, object, object]:
    stage, config, inputs = made_patch(store)
    shown = mi_pipe.open(execute(stage, config, inputs, store).artifact.path)
    config = report.ReportConfig(title="mine").for_run("toy", "a toy", {"name": "toy"}, [])
    return report.STAGE, config, report.Inputs([inputs.task, shown])


MAKERS = [
    *(made_training, made_features, made_lenses, made_probes, made_patch),
    *(made_circuit, made_model, made_import, made_report),
]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__.removeprefix("made_"))
def artifact(request, store) -> Artifact:
    torch.set_num_threads(1)
    stage, config, inputs = request.param(store)
    return execute(stage, config, inputs, store).artifact


def lasting(artifact: Artifact) -> dict[str, bytes]:
    """Return the bytes of every file that is a function of config and inputs alone."""
    files = artifact.manifest.files
    return {name: (artifact.path / name).read_bytes() for name in files if not files[name].volatile}


def without_times(manifest: Manifest) -> Manifest:
    """Return a manifest less what it says of files of times."""
    files = {name: entry for name, entry in manifest.files.items() if not entry.volatile}
    return manifest.model_copy(update={"files": files})


def test_every_file_comes_back(artifact, store):
    whole, manifest = lasting(artifact), artifact.manifest
    for i, name in enumerate(manifest.files):
        (flip, os.unlink)[i % 2](artifact.path / name)
    (artifact.path / "manifest.json").unlink()
    assert len(verify(artifact.id, store, deep=True).damage) == 1, "without its manifest nothing else is known"
    done = repair(artifact.id, store)
    assert set(done.mended) == {*manifest.files, "manifest.json"}
    assert lasting(artifact) == whole
    assert verify(artifact.id, store, deep=True).is_whole
    now = read_manifest(artifact.path)
    assert without_times(now) == without_times(manifest)
    assert now.digest == manifest.digest
    assert store.manifest_copy(artifact.id).read_bytes() == (artifact.path / "manifest.json").read_bytes()
    mi_pipe.open(artifact.id, store).check()


def test_a_capture_says_how_it_is_made_again(store):
    module, values = nn.Sequential(nn.Linear(4, 8)), torch.rand(40, 4)
    acts = capture(module, values, ["0"], store)
    flip(acts.path / "tokens.parquet")
    with pytest.raises(StageError, match=rf"only a program has\. Remove it with `mi-pipe rm {acts.id}` and call"):
        repair(acts.id, store)
    store.remove(acts.id)
    again = capture(module, values, ["0"], store)
    assert (again.id, again.digest) == (acts.id, acts.digest)
