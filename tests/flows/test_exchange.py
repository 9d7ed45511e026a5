"""Export and import as users meet them: ids that the next command takes, exit codes, one sentence for each mistake."""

import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest

import mi_pipe
from mi_pipe.export import hdf5
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy
from tests.flows.test_cli import command, only_line  # noqa: F401 (a fixture)
from tests.stages.scored_toy import toy_saes
from tests.stages.toys import toy_model

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture
def acts(store):
    return harvest_toy(store, [20] * 8, store_dtype="float32", precision="float32")


@pytest.fixture
def dump(tmp_path):
    """A `.npy` file and its token table; returns (file, table, values)."""
    values = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    np.save(tmp_path / "acts.npy", values)
    table = pd.DataFrame({"prompt_idx": np.repeat([0, 1], 6), "pos": np.tile(np.arange(6), 2), "token_id": range(12)})
    table.to_csv(tmp_path / "tokens.csv", index=False)
    return str(tmp_path / "acts.npy"), str(tmp_path / "tokens.csv"), values


def test_a_store_goes_out_as_hdf5_and_comes_back(command, acts, tmp_path):  # noqa: F811
    out = tmp_path / "acts.h5"
    code, said, err = command("export", acts.id[:12], "--to", "hdf5", "--out", str(out), "--hook", HEADS)
    assert code == 0, err
    assert str(out) in only_line(said)
    with h5py.File(out) as file:
        assert list(file["activations"]) == [HEADS]
    code, said, err = command("import", str(out))
    assert code == 0, err
    name = said.splitlines()[-1]
    assert "Completed" in said
    again = mi_pipe.open(name)
    np.testing.assert_array_equal(again.read_rows(HEADS, 0, 160), acts.read_rows(HEADS, 0, 160))
    assert "Cached" in command("import", str(out))[1]
    assert command("verify", name, "--deep")[0] == 0
    assert name in command("status")[1]
    assert "contents" in command("show", name)[1]


def test_a_store_goes_out_for_saelens(command, acts, tmp_path):  # noqa: F811
    from datasets import load_from_disk

    out = tmp_path / "cache"
    assert command("export", acts.id, "--to", "saelens", "--out", str(out))[0] == 0
    assert load_from_disk(str(out)).column_names == [RESIDUAL, HEADS, "token_ids"]


def test_a_dump_comes_in(command, dump):  # noqa: F811
    file, table, values = dump
    code, said, err = command("import", file, "--tokens", table, "--hook", HOOK, "--model", "mine")
    assert code == 0, err
    assert "12 rows of 2 prompts, float32" in said
    acts = mi_pipe.open(said.splitlines()[-1])
    np.testing.assert_array_equal(acts.read_rows(HOOK, 0, 12), values)
    assert acts.group.attrs["model"] == "mine"
    code, said, _ = command("import", file, "--tokens", table, "--hook", HOOK, "--store-dtype", "bfloat16")
    assert code == 0
    assert mi_pipe.open(said.splitlines()[-1]).dtype == "bfloat16"


def test_saes_go_out_to_three_programs_and_come_back(command, acts, store, tmp_path):  # noqa: F811
    saes = toy_saes(store, hooks=(RESIDUAL, HEADS))
    for peer, name, files in (
        ("saelens", "first.threshold", {"cfg.json", "sae_weights.safetensors"}),
        ("sparsify", "first.topk", {"cfg.json", "sae.safetensors"}),
        ("dictionary_learning", "first.threshold", {"config.json", "ae.pt"}),
    ):
        out = tmp_path / peer
        words = ["--to", peer, "--out", str(out), "--sae", name, "--sae", "second.topk"]
        code, said, err = command("export", saes.id, *words)
        assert code == 0, err
        assert str(out) in only_line(said)
        assert {path.name for path in out.iterdir()} == {name, "second.topk"}
        assert {path.name for path in (out / name).iterdir()} == files | {"probe.safetensors"}
    folders = [str(tmp_path / "saelens" / "first.threshold"), str(tmp_path / "sparsify" / "first.topk")]
    code, said, err = command("import-saes", *folders, "--activations", acts.id, "--device", "cpu")
    assert code == 0, err
    assert "Completed" in said
    assert "FVU" in said
    again = mi_pipe.open(said.splitlines()[-1])
    assert again.names == ["L0.resid_post.threshold.d48", "L0.resid_post.topk.k4.d48"]
    np.testing.assert_array_equal(again[again.names[0]].W_enc, saes["first.threshold"].W_enc)
    # The activations know their model and prompts, so the SAEs were run in the model too.
    assert np.isfinite(again.evaluation["ce_sae"]).all()
    assert "Cached" in command("import-saes", *folders, "--activations", acts.id)[1]
    code, said, _ = command("import-saes", folders[0], "--hook", HEADS, "--model", "mine")
    assert code == 0
    unmeasured = mi_pipe.open(said.splitlines()[-1])
    assert (unmeasured[unmeasured.names[0]].hook, unmeasured[unmeasured.names[0]].model) == (HEADS, "mine")
    assert unmeasured.id in command("status")[1]
    assert command("verify", unmeasured.id, "--deep")[0] == 0


def test_mistakes_are_one_sentence(command, acts, store, dump, tmp_path):  # noqa: F811
    file, table, _ = dump
    model = toy_model(store)
    saes = toy_saes(store, hooks=(RESIDUAL, HEADS))
    ragged = harvest_toy(store, [20, 7])
    (tmp_path / "there.h5").touch()
    words = ["--to", "hdf5", "--out", str(tmp_path / "new.h5")]
    cases = [
        (["export", "harvest-nothing", *words], "No artifact"),
        (["export", model.id, *words], "holds no activations"),
        (["export", acts.id, *words, "--hook", "blocks.0.hook_resid_pots"], "Did you mean"),
        (["export", acts.id, "--to", "hdf5", "--out", str(tmp_path / "there.h5")], "exists already"),
        (["export", ragged.id, "--to", "saelens", "--out", str(tmp_path / "new")], "prompts of one length"),
        (["export", saes.id, *words], "go --to saelens or dictionary_learning or sparsify, not to hdf5"),
        (["export", acts.id, "--to", "sparsify", "--out", str(tmp_path / "new")], "go --to hdf5 or saelens, not to"),
        (["export", acts.id, "--to", "saelens", "--out", str(tmp_path / "new"), "--sae", "x"], "named with --hook"),
        (["export", saes.id, "--to", "saelens", "--out", str(tmp_path / "new"), "--hook", HEADS], "named with --sae"),
        (
            ["export", saes.id, "--to", "saelens", "--out", str(tmp_path / "new"), "--sae", "first.topkk"],
            "Did you mean",
        ),
        (
            ["export", saes.id, "--to", "sparsify", "--out", str(tmp_path / "new")],
            "first.threshold is an SAE whose rule",
        ),
        (["import-saes", str(tmp_path / "gone")], "gone is no folder"),
        (["import-saes", str(tmp_path), "--activations", model.id], "holds no activations"),
        (["import", file, "--hook", HOOK], "--tokens"),
        (["import", file, "--tokens", table], "--hook"),
        (["import", file, "--tokens", table, "--hook", HOOK, "--hook", HOOK], "two --hook"),
        (["import", str(tmp_path / "gone.npy"), "--tokens", table, "--hook", HOOK], "no file"),
        (["import", file, "--tokens", str(tmp_path / "gone.csv"), "--hook", HOOK], "gone.csv"),
    ]
    for line, message in cases:
        code, _, err = command(*line)
        assert code == 2, line
        assert message in only_line(err), line
    assert not (tmp_path / "new.h5").exists()
    assert not (tmp_path / "new").exists()
    for line in (["export", acts.id], ["export", acts.id, "--to", "csv", "--out", "x"], ["import"], ["import-saes"]):
        assert command(*line)[0] == 2


INTERRUPTED_IMPORT = """
import os, signal, sys, time
from flows import cli
from mi_pipe.export.import_job import ImportJob
fill = ImportJob.fill
def fill_one(self, shards, *told):
    fill(self, list(shards)[:1], *told)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
ImportJob.fill = fill_one
cli.main()
"""


def test_an_interrupted_import_says_one_sentence_and_goes_on(command, dump, store):  # noqa: F811
    file, table, _ = dump
    line = ["import", file, "--tokens", table, "--hook", HOOK]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, *line], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 130
    assert "What is finished stays in the store" in only_line(done.stderr)
    assert len(store.unfinished_ids()) == 1
    assert "Resumed" in command(*line)[1]


def test_an_interrupted_export_says_one_sentence_and_leaves_nothing(command, acts, tmp_path, monkeypatch):  # noqa: F811
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hdf5, "_write_statistics", interrupted)
    code, _, err = command("export", acts.id, "--to", "hdf5", "--out", str(tmp_path / "acts.h5"))
    assert code == 130
    assert only_line(err).startswith("Interrupted.")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
