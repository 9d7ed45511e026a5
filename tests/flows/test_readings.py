"""Recipes with lenses and probes: run, cached, reported; mistakes are one sentence before any work."""

import json

import pytest

import mi_pipe
from mi_pipe.core.store import Store
from tests.flows.test_cli import command, only_line  # noqa: F401 (a fixture)
from tests.flows.test_given import ids, write

TOY = {"n_steps": 20, "seed": 0, "model": {"d_model": 32, "n_heads": 4}}
PAIRS = {"family": "induction", "n_pairs": 40}
HARVEST = {"hooks": ["blocks.*.hook_resid_post"], "precision": "float32", "device": "cpu"}
LENSES = {"max_prompts": 4, "tuned": {"n_steps": 4, "checkpoint_steps": 2, "batch_rows": 128}, "device": "cpu"}
PROBES = {
    "labels": {"clean": {"where": "role == 'clean'"}, "length": {"column": "n_tokens", "kind": "regression"}},
    "positions": ["last", "answer"],
    "fit": {"l2": [0.1]},
    "causal": {"amounts": [2], "max_prompts": 4},
    "device": "cpu",
}
SECTIONS = {"train_model": TOY, "prompts": PAIRS, "tasks": {"mine": PAIRS}, "harvest": HARVEST}


def test_a_recipe_with_lenses_and_probes_runs_reruns_and_is_reported(command, tmp_path):  # noqa: F811
    recipe = write(tmp_path / "r.yaml", **SECTIONS, lenses=LENSES, probes=PROBES, report={})
    code, out, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    assert "kl_tuned_lens" in out
    assert "best_accuracy" in out
    steps = ids(command("plan", recipe, "--json")[1])
    assert mi_pipe.open(steps["lenses"]).tasks == ["induction"]
    assert mi_pipe.open(steps["probes"]).labels == ["clean"] or "length" in mi_pipe.open(steps["probes"]).labels
    code, out, _ = command("run", recipe, "--no-prefect")
    assert {line.split()[2] for line in out.splitlines() if line[0] in "=+"} == {"Cached"}
    report = mi_pipe.open(steps["report"])
    assert {"lenses.html", "probes.html"} <= set(report.pages)
    assert steps["lenses"] in report.file("lenses.html").read_text()


def test_the_logit_lens_alone_needs_no_activations(command, tmp_path):  # noqa: F811
    recipe = write(tmp_path / "r.yaml", train_model=TOY, tasks={"mine": PAIRS}, lenses={"max_prompts": 2})
    code, _, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    found = mi_pipe.open(ids(command("plan", recipe, "--json")[1])["lenses"])
    assert set(found.inputs) == {"model", "tasks.0"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lenses": {"tuned": {}}, "harvest": None, "prompts": None}, "trained on activations"),
        ({"lenses": {}, "tasks": None}, "needs a section 'tasks'"),
        ({"lenses": {"tuned": {"n_step": 3}}}, "Did you mean 'n_steps'"),
        ({"lenses": LENSES, "harvest": {"hooks": ["blocks.0.hook_attn_out"]}}, "needs the residual stream"),
        ({"probes": PROBES, "harvest": None, "prompts": None}, "needs a section 'harvest' or 'activations'"),
        ({"probes": {}}, "labels"),
        ({"probes": {"labels": {"x": {}}}}, "one of column, where, function and table"),
        ({"probes": {**PROBES, "hooks": ["blocks.0.hook_resid_mid"]}}, "section harvest does not store"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_begun(command, store: Store, tmp_path, sections, message):  # noqa: F811
    whole = {name: content for name, content in {**SECTIONS, **sections}.items() if content is not None}
    recipe = write(tmp_path / "r.yaml", **whole)
    code, _, err = command("run", recipe, "--no-prefect")
    assert code == 2, err
    assert message in only_line(err)
    assert not store.published_ids()


def test_labels_of_activations_that_are_there_are_looked_at_first(command, tmp_path):  # noqa: F811
    recipe = write(tmp_path / "r.yaml", **SECTIONS)
    assert command("run", recipe, "--no-prefect")[0] == 0
    wrong = {**PROBES, "labels": {"x": {"column": "rol"}}}
    again = write(tmp_path / "again.yaml", **SECTIONS, probes=wrong)
    code, _, err = command("plan", again)
    assert code == 2
    assert "Did you mean 'role'" in only_line(err)
    acts = ids(command("plan", recipe, "--json")[1])["harvest"]
    without = {name: value for name, value in PROBES.items() if name != "causal"}
    given = write(tmp_path / "given.yaml", activations=acts, probes=without)
    code, _, err = command("run", given, "--no-prefect")
    assert code == 0, err
    rows = json.loads(command("plan", given, "--json")[1])
    assert {row["step"]: row["action"] for row in rows}["probes"] == "cached"
