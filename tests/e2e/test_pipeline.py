"""The whole pipeline as users run it: real Prefect, real stages, cached reruns, kills, and bad input."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mi_pipe.core.store import Store
from tests.e2e.mini import command, digests, environment, run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted mini run through Prefect: (store folder, what it printed, its Prefect home's folder)."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder / "store", folder, prefect=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "store", done, folder


def test_every_stage_is_made_and_the_report_is_there(whole):
    store, done, _ = whole
    stages = {artifact_id.rpartition("-")[0] for artifact_id in Store(store).published_ids()}
    assert stages == {
        "train_model",
        "generate_prompts",
        "harvest",
        "train_saes",
        "score_features",
        "heads",
        "patch",
        "attribute",
        "lenses",
        "circuits",
        "report",
    }
    path = done.stdout.split("Report: ")[1].strip()
    assert Path(path).is_file()
    assert "Traceback" not in done.stderr


def test_prefect_shows_each_step_with_its_state(whole):
    store, _, folder = whole
    again = run(store, folder, prefect=True)
    assert again.returncode == 0, again.stderr
    script = """
import asyncio, json
from prefect.client.orchestration import get_client
async def main():
    async with get_client() as client:
        flows = await client.read_flow_runs()
        tasks = await client.read_task_runs()
        artifacts = await client.read_artifacts()
        print(json.dumps([[f.state_name for f in flows], [[t.name, t.state_name] for t in tasks],
                          [a.type for a in artifacts]]))
asyncio.run(main())
"""
    env = environment(folder) | {"PREFECT_LOGGING_LEVEL": "ERROR", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    flows, tasks, artifacts = json.loads(out.stdout.strip().splitlines()[-1])
    assert flows == ["Completed", "Completed"]
    labels = {name for name, _ in tasks}
    assert {"model", "prompts", "harvest", "saes", "features", "heads", "report"} <= labels
    for label in labels:
        assert sorted(state for name, state in tasks if name == label) == ["Cached", "Completed"]
    assert artifacts.count("table") >= len(labels)


def test_a_finished_recipe_does_no_work_again(whole):
    store, _, folder = whole
    before = {path: path.stat().st_mtime_ns for path in store.rglob("manifest.json")}
    done = run(store, folder)
    assert done.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("manifest.json")} == before
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("=")]
    assert len(lines) == len(before)
    assert sum(float(line[3]) for line in lines) < 5.0


def test_one_field_of_features_remakes_features_and_report_only(whole):
    store, _, folder = whole
    line = command(store, "features.n_top=5")
    line[line.index("run")] = "plan"
    line.remove("--no-prefect")
    out = subprocess.run([*line, "--json"], capture_output=True, text=True, env=environment(folder), check=True)
    rows = {row["step"]: row for row in json.loads(out.stdout)}
    assert {step for step, row in rows.items() if row["action"] != "cached"} == {"features", "report"}
    assert "n_top" in rows["features"]["reason"]
    assert "features" in rows["report"]["reason"]


@pytest.mark.slow
def test_a_run_shared_among_dask_workers_by_prefect_ends_with_the_same_digests(whole, tmp_path):
    done = run(tmp_path / "shared", tmp_path, "--workers", "2", prefect=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digests(tmp_path / "shared") == digests(whole[0])


STAGES = [
    "train_model",
    "generate_prompts",
    "heads",
    "patch",
    "attribute",
    "circuits",
    "harvest",
    "lenses",
    "train_saes",
    "score_features",
    "report",
]


def test_killed_in_every_stage_the_same_command_ends_as_an_uninterrupted_run(whole, tmp_path):
    store = tmp_path / "killed"
    rng = random.Random(1)
    for stage in STAGES:
        kill_in(stage, store, tmp_path, rng.uniform(0.0, 0.3))
    done = run(store, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digests(store) == digests(whole[0])


def kill_in(stage: str, store: Path, tmp_path: Path, delay_s: float) -> None:
    """Start the run, wait until `stage` works, and SIGKILL it `delay_s` later (or let it end, if it is faster)."""
    process = subprocess.Popen(
        command(store), env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if any((store / ".work").glob(f"{stage}-*")):
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    process.wait(timeout=10)


def test_ctrl_c_says_what_is_safe_and_how_to_go_on(tmp_path):
    store = tmp_path / "store"
    process = subprocess.Popen(
        command(store, "train_model.n_steps=100000"),
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any((store / ".work").glob("train_model-*/ledger.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "safe" in out
    assert "mi-pipe run tiny" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["harvest.hooks=[blocks.0.hook_resid_pots]"], 2, "blocks.0.hook_resid_post"),
        (["harvest.hooks=[blocks.7.hook_resid_post]"], 2, "layers 0 to 1, not 7"),
        (["saes.hooks=[blocks.0.hook_resid_pre]"], 2, "saes.hooks: harvest.hooks holds no activations of"),
        (["saes.kk=3"], 2, "unknown key 'saes.kk'"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(tmp_path, words, code, message):
    done = run(tmp_path / "store", tmp_path, *words)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store" / "train_model").exists()


def test_help_answers_at_once_and_every_command_has_an_example(tmp_path):
    from flows.cli import cli

    def commands(path, command):
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from commands([*path, name], child)

    best = float("inf")
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "flows.cli", "--help"], check=True, capture_output=True)
        best = min(best, time.monotonic() - started)
    assert best < 2.0, "the promise is 0.5 s on a quiet machine"
    from click.testing import CliRunner

    for path in commands([], cli):
        shown = CliRunner().invoke(cli, [*path, "--help"]).output
        assert "\n  Example:\n    mi-pipe" in shown, path
