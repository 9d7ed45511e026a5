import math
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch

import mi_pipe
from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.errors import ArtifactDamagedError, ArtifactNotFoundError, ConfigError, HookPointError
from mi_pipe.core.manifest import FileEntry, write_manifest
from mi_pipe.core.stage import Result, execute
from mi_pipe.core.store import Store
from mi_pipe.models.source import load_source
from mi_pipe.saes.sae_set import SAESet
from mi_pipe.saes.training import CURVE_COLUMNS
from stages import train_saes
from tests.stages.sae_toy import FIRST, SECOND, sae_inputs, toy_config

NAMES = [f"L{layer}.resid_post.{kind}.k4.d64.s0" for layer in (0, 1) for kind in ("topk", "batchtopk")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    torch.set_num_threads(1)
    return Store(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def inputs(shared):
    return sae_inputs(shared)


@pytest.fixture(scope="module")
def result(shared, inputs) -> Result:
    return execute(train_saes.STAGE, toy_config(), inputs, shared)


@pytest.fixture(scope="module")
def saes(result) -> SAESet:
    opened = mi_pipe.open(result.artifact.path)
    assert isinstance(opened, SAESet)
    return opened


def test_sweep_is_the_product_of_its_lists(saes):
    assert saes.names == NAMES
    assert saes.of_hook(SECOND) == NAMES[2:]
    assert list(saes.training.columns) == list(CURVE_COLUMNS)
    assert list(saes.training.query("sae == @NAMES[0]")["step"]) == [10, 20, 30, 40, 50, 60]


def test_training_lowers_the_unexplained_variance(saes):
    for _, curve in saes.training.groupby("sae"):
        assert curve["fvu"].iloc[-1] < 0.7 * curve["fvu"].iloc[0]


def test_loaded_sae_takes_raw_activations(saes, inputs):
    sae = saes[NAMES[2]]
    x = torch.from_numpy(inputs.activations.read_rows(SECOND, 0, 500))
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    row = saes.evaluation.set_index("sae").loc[NAMES[2]]
    assert float(fvu) == pytest.approx(row["fvu"], rel=0.3)
    assert sae.hook == SECOND
    assert (sae.d_in, sae.d_sae, sae.k) == (32, 64, 4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert int((sae.encode(x) > 0).sum(1).max()) <= 4


def test_batchtopk_selects_by_its_threshold_after_training(saes):
    sae = saes[NAMES[1]]
    row = saes.evaluation.set_index("sae").loc[NAMES[1]]
    assert sae.rule.kind == "threshold"
    assert float(sae.threshold) > 0
    assert row["l0"] == pytest.approx(4, rel=0.3)


def test_cross_entropies_equal_a_plain_computation(saes, inputs):
    """The toy has no BOS and no massive rows: every position of a held-out prompt is replaced."""
    name = NAMES[0]
    sae, row = saes[name], saes.evaluation.set_index("sae").loc[name]
    model = load_source(inputs.model, "cpu")
    store = inputs.activations
    held_out = [i for i, held in enumerate(store.held_out_prompts(0.1, 0)) if held]
    chosen = [held_out[int(i)] for i in torch.linspace(0, len(held_out) - 1, min(6, len(held_out)), dtype=torch.double)]
    assert not store.massive(FIRST).any()
    assert row["n_prompts"] == len(chosen)

    def loss(edits) -> float:
        total, n = 0.0, 0
        for i in chosen:
            tokens = torch.tensor(inputs.prompts.prompt(i)).long()
            with model.edited(edits), torch.no_grad():
                log_probs = model.logits(tokens[None])[0].double().log_softmax(-1)
            total -= sum(float(log_probs[t, tokens[t + 1]]) for t in range(len(tokens) - 1))
            n += len(tokens) - 1
        return total / n

    clean, spliced, zero = loss({}), loss({FIRST: sae}), loss({FIRST: torch.zeros_like})
    assert row["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert row["ce_sae"] == pytest.approx(spliced, rel=1e-4)
    assert row["ce_zero"] == pytest.approx(zero, rel=1e-5)
    assert row["ce_recovered"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)


def test_running_again_does_nothing(shared, inputs, result):
    assert execute(train_saes.STAGE, toy_config(device="auto"), inputs, shared).outcome == "Cached"


def test_hook_points_trained_apart_equal_those_of_one_sweep(store, inputs, saes):
    alone = execute(train_saes.STAGE, toy_config(hooks=[SECOND], architecture="topk"), inputs, store)
    sae = SAESet(alone.artifact.path)[NAMES[2]]
    assert torch.equal(sae.W_enc, saes[NAMES[2]].W_enc)


def test_no_prompts_means_no_cross_entropy(store, inputs):
    config = toy_config(hooks=[FIRST], architecture="topk", evaluation={"n_prompts": 0})
    made = execute(train_saes.STAGE, config, inputs, store).artifact
    assert math.isnan(SAESet(made.path).evaluation["ce_recovered"].iloc[0])
    assert "ce_recovered_max" not in made.summary


def test_a_killed_training_ends_with_the_bytes_of_an_uninterrupted_one(shared, inputs, result, tmp_path):
    copy = copied(shared, tmp_path)
    kill_at(copy, result.artifact.id, n_units=20, delay_s=0.05)
    assert copy.ledger(result.artifact.id).n_total == 2 * 50 + 4
    resumed = execute(train_saes.STAGE, toy_config(), inputs, copy)
    assert resumed.outcome == "Resumed"
    assert checksums(resumed.artifact) == checksums(result.artifact)
    assert resumed.artifact.digest == result.artifact.digest


@pytest.mark.storm
def test_a_training_killed_at_many_moments_ends_with_the_same_bytes(shared, inputs, result, tmp_path):
    chance = random.Random(0)
    for n_kills in range(4):
        copy = copied(shared, tmp_path / str(n_kills))
        for moment in sorted(chance.sample(range(105), n_kills + 1)):
            kill_at(copy, result.artifact.id, n_units=moment, delay_s=chance.uniform(0, 0.1))
        assert execute(train_saes.STAGE, toy_config(), inputs, copy).artifact.digest == result.artifact.digest


def copied(shared: Store, folder) -> Store:
    """Return a store with everything that training reads, and no training."""
    shutil.copytree(shared.root, folder / "copy", ignore=shutil.ignore_patterns("train_saes", ".work"))
    return Store(folder / "copy")


def kill_at(store: Store, artifact_id: str, n_units: int, delay_s: float) -> None:
    """Start a training in a process of its own and kill it shortly after `n_units` units are done."""
    command = [sys.executable, "-m", "tests.stages.sae_toy", str(store.root), "0.005", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and store.ledger(artifact_id).n_done < n_units:
        time.sleep(0.01)
    time.sleep(delay_s)
    process.kill()
    process.wait()


def checksums(artifact) -> dict[str, str]:
    return {name: entry.checksum for name, entry in artifact.manifest.files.items() if not entry.volatile}


def test_estimate_covers_what_is_written(inputs, result):
    written = sum(entry.size_bytes for name, entry in result.artifact.manifest.files.items() if "weights" in name)
    assert train_saes.estimate(toy_config(), inputs).size_bytes >= written


def test_unknown_hook_point_is_answered_with_near_names(store, inputs):
    with pytest.raises(HookPointError, match=r"blocks\.1\.hook_resid_pots.*Did you mean 'blocks\.1\.hook_resid_post'"):
        execute(train_saes.STAGE, toy_config(hooks=["blocks.1.hook_resid_pots"]), inputs, store)


def test_k_above_the_width_is_refused(store, inputs):
    with pytest.raises(ConfigError, match="k=65 is more than d_sae=64"):
        execute(train_saes.STAGE, toy_config(k=[4, 65]), inputs, store)


def test_a_fixed_coefficient_for_a_loss_that_aims_at_k_is_refused(store, inputs):
    config = toy_config(architecture="jumprelu", sparsity={"coefficient": 1.0})
    with pytest.raises(ConfigError, match=r"jumprelu\.loss=step or"):
        execute(train_saes.STAGE, config, inputs, store)


def test_the_same_option_twice_is_refused(store, inputs):
    with pytest.raises(ConfigError, match="more than once"):
        execute(train_saes.STAGE, toy_config(k=[4, 4]), inputs, store)


def test_a_batch_larger_than_the_store_is_refused(store, inputs):
    with pytest.raises(ConfigError, match="too few for a batch of 1,000,000"):
        execute(train_saes.STAGE, toy_config(batch_rows=1_000_000, n_tokens=2_000_000), inputs, store)


def test_unknown_sae_name_is_answered_with_near_names(saes):
    with pytest.raises(ArtifactNotFoundError, match="Did you mean"):
        saes["L0.resid_post.topk.k4.d64.s1"]


def test_weights_that_do_not_reproduce_the_probe_are_refused(result, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(result.artifact.path, folder)
    name = f"saes/{NAMES[0]}/weights.safetensors"
    path = folder / name
    tensors = load_file(path)
    tensors["W_dec"] = tensors["W_dec"].flip(0).contiguous()
    path.chmod(0o644)
    save_file(tensors, path)
    with pytest.raises(ArtifactDamagedError, match="differs from its checksum"):
        SAESet(folder)[NAMES[0]]
    manifest = result.artifact.manifest
    entry = FileEntry(size_bytes=path.stat().st_size, checksum=f"sha256:{file_sha256(path)}")
    write_manifest(folder, manifest.model_copy(update={"files": {**manifest.files, name: entry}}))
    with pytest.raises(ArtifactDamagedError, match="does not reproduce its probe"):
        SAESet(folder)[NAMES[0]]
