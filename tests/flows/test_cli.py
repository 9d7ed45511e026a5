"""The command as users meet it: exit codes, one sentence for each mistake, and nothing begun."""

import json
import sys
from pathlib import Path

import pytest

from flows import cli
from mi_pipe.core.lock import exclusive_lock
from mi_pipe.core.store import Store
from tests.models.tiny import save_tiny_llama


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `mi-pipe` in this process with a store of its own; returns (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mi-pipe", *words])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def recipe(tmp_path):
    """A recipe on a tiny Llama in a folder, with pairs from a file; returns its path."""
    save_tiny_llama(tmp_path / "model")
    pairs = [{"clean": "a b c", "corrupted": "a d c", "answer": " b", "wrong": " d"}] * 2
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model:\n  name: {tmp_path / 'model'}\n  device: cpu\n"
        f"tasks:\n  mine:\n    family: pairs\n    path: {tmp_path / 'pairs.jsonl'}\n"
    )
    return path


def only_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_a_model_in_a_folder_and_pairs_in_a_file_run_and_rerun(command, recipe):
    code, out, _ = command("run", str(recipe), "patch={units: [resid_pre, head_out]}", "--no-prefect")
    assert code == 0, out
    assert "patch.mine" in out
    code, out, _ = command("run", str(recipe), "patch={units: [resid_pre, head_out]}", "--no-prefect")
    assert [line.split()[2] for line in out.splitlines()] == ["Cached", "Cached"]
    code, out, _ = command("plan", str(recipe), "patch={units: [resid_pre]}", "--json")
    rows = {row["step"]: row for row in json.loads(out)}
    assert rows["prompts.mine"]["action"] == "cached"
    assert rows["patch.mine"]["action"] == "run"
    assert "units" in rows["patch.mine"]["reason"]


def break_model(folder: Path, _recipe: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def empty_pairs(folder: Path, _recipe: Path) -> None:
    (folder / "pairs.jsonl").write_text("")


def two_token_answer(folder: Path, _recipe: Path) -> None:
    pair = {"clean": "a b c", "corrupted": "a d c", "answer": " b e", "wrong": " d"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair))


def latin1_text(folder: Path, recipe: Path) -> None:
    (folder / "text.txt").write_bytes("caf\u00e9".encode("latin-1"))
    text = f"prompts:\n  family: corpus\n  source: files\n  window: 4\n  files: {{paths: [{folder / 'text.txt'}]}}\n"
    recipe.write_text(recipe.read_text() + text)


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (break_model, 2, "has no weights"),
        (empty_pairs, 2, "pairs.jsonl is empty"),
        (two_token_answer, 1, "' b e'"),
        (latin1_text, 1, "not UTF-8"),
    ],
)
def test_input_that_cannot_be_used_is_one_sentence(command, recipe, tmp_path, spoil, code, message):
    spoil(tmp_path, recipe)
    found, _, err = command("run", str(recipe), "--no-prefect")
    assert found == code, err
    assert message in only_line(err)


def test_a_locked_artifact_is_named_with_its_process(command, recipe, store):
    _, out, _ = command("plan", str(recipe), "--json")
    name = json.loads(out)[0]["id"]
    with exclusive_lock(store.lock_path(name), name):
        code, _, err = command("run", str(recipe), "--no-prefect")
        _, plan, _ = command("plan", str(recipe))
    assert code == 1
    assert "is being written by process" in only_line(err)
    assert "wait" in plan


def test_a_damaged_artifact_stops_the_run_and_rm_helps(command, recipe, store):
    command("run", str(recipe), "--no-prefect")
    (name,) = store.published_ids()
    (store.folder(name) / "tokens.parquet").unlink()
    code, _, err = command("run", str(recipe), "--no-prefect")
    assert code == 1
    assert f"mi-pipe rm {name}" in only_line(err)
    assert command("rm", name, "--yes")[0] == 0
    assert command("run", str(recipe), "--no-prefect")[0] == 0


def test_show_status_and_verify_tell_of_artifacts(command, recipe, store):
    command("run", str(recipe), "--no-prefect")
    (name,) = store.published_ids()
    assert name in command("status")[1]
    assert "family" in command("show", name[:20])[1]
    assert "whole" in command("verify", name, "--deep")[1]
    victim = store.folder(name) / "dropped.json"
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes().replace(b"{", b"["))
    assert command("verify", name)[0] == 0, "sizes are as they were"
    code, out, _ = command("verify", name, "--deep")
    assert code == 1
    assert "damaged: dropped.json differs from its checksum" in out
    assert f"mi-pipe repair {name}" in out


def test_repair_mends_what_verify_names_and_says_what_it_cannot(command, recipe, store, tmp_path):
    command("run", str(recipe), "--no-prefect")
    (name,) = store.published_ids()
    assert "was whole" in command("repair", name[:20])[1]
    (store.folder(name) / "tokens.parquet").unlink()
    (store.folder(name) / "manifest.json").unlink()
    code, out, _ = command("repair", name)
    assert code == 0, out
    assert out.splitlines()[:2] == ["mended: manifest.json", "mended: tokens.parquet"]
    assert command("verify", name, "--deep")[0] == 0
    (store.folder(name) / "tokens.parquet").unlink()
    (tmp_path / "pairs.jsonl").write_text("changed")
    code, _, err = command("repair", name)
    assert code == 1
    assert f"mi-pipe rm {name}" in only_line(err)
    assert command("repair", "harvest-00")[0] == 2
    (store.folder(name) / "manifest.json").unlink()
    store.manifest_copy(name).unlink()
    assert command("verify", name)[0] == 1
    assert command("rm", name, "--yes")[0] == 0


def test_usage_mistakes_exit_with_2_and_near_names(command):
    assert command("run", "no-such-recipe")[0] == 2
    assert command("run", "tiny", "smollm2")[0] == 2
    assert command("rnu")[0] == 2
    code, _, err = command("show", "harvest-00")
    assert code == 2
    assert "mi-pipe status" in only_line(err)


def test_config_show_prints_every_default(command):
    code, out, _ = command("config", "show", "tiny", "saes.k=4")
    assert code == 0
    assert "checkpoint_s" in out
    assert "k: 4" in out


def test_the_store_is_the_flag_then_the_recipe_then_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("MI_PIPE_STORE", str(tmp_path / "variable"))
    assert Store().root == tmp_path / "variable"
    assert Store(tmp_path / "named").root == tmp_path / "named"
    monkeypatch.delenv("MI_PIPE_STORE")
    monkeypatch.chdir(tmp_path)
    assert Store().root == tmp_path / "data" / "store"
