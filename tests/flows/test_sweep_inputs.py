"""Recipes whose SAEs read a second store (two models) or go on from a finished training."""

import json
import re

import numpy as np
import pandas as pd
import pytest

import mi_pipe
from tests.flows.test_cli import command, only_line  # noqa: F401 (a fixture)
from tests.flows.test_given import FEATURES, HARVEST, HOOK, SAES, ids, write

PROMPTS = {"family": "repeated", "n_prompts": 60, "length": 24, "max_period": 10}
BOTH = f"{HOOK} + other:{HOOK}"


def toy(seed: int) -> dict:
    """The section of a toy model, trained for a moment."""
    return {"n_steps": 20, "seed": seed, "model": {"d_model": 32, "n_heads": 4}}


@pytest.fixture
def first(command, tmp_path) -> dict:  # noqa: F811
    """Ids of the steps of a recipe that harvests a toy."""
    recipe = write(tmp_path / "first.yaml", train_model=toy(0), prompts=PROMPTS, harvest=HARVEST)
    code, _, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    return ids(command("plan", recipe, "--json")[1])


def test_a_crosscoder_of_two_models_is_trained_scored_and_reported(command, first, tmp_path):  # noqa: F811
    saes = {**SAES, "hooks": [BOTH, HOOK], "other_store": first["harvest"][:-4], "n_tokens": 256 * 150}
    sections = {"train_model": toy(1), "prompts": PROMPTS, "harvest": HARVEST, "features": FEATURES, "report": {}}
    recipe = write(tmp_path / "r.yaml", saes=saes, **sections)
    code, out, err = command("plan", recipe)
    assert code == 0, err
    assert "other_store" in out
    assert first["harvest"] in out
    code, out, err = command("run", recipe, "--no-prefect")
    assert code == 0, err

    steps = ids(command("plan", recipe, "--json")[1])
    trained, features = mi_pipe.open(steps["saes"]), mi_pipe.open(steps["features"])
    assert trained.manifest.inputs["other"].id == features.manifest.inputs["other"].id == first["harvest"]
    both, alone = trained.names
    rows = trained.evaluation.set_index("sae")
    assert rows.loc[both, "fvu"] < 0.6
    assert np.isnan(rows.loc[both, "ce_recovered"])
    assert not np.isnan(rows.loc[alone, "ce_recovered"])
    norms = features.decoder_norms(both)
    assert list(norms["hook"].unique()) == [HOOK, f"other:{HOOK}"]
    told = out.splitlines()[[line.split()[1] for line in out.splitlines()].index("saes") + 1 :][:2]
    assert [line.split()[0] for line in told] == [both, alone]
    assert "CE recovered" not in told[0]
    assert f"CE recovered {rows.loc[alone, 'ce_recovered']:.3f}" in told[1]
    assert norms.groupby("feature")["share"].sum().to_numpy() == pytest.approx(np.ones(48), abs=1e-5)
    assert features.decoder_norms(alone).empty
    report = mi_pipe.open(steps["report"])
    assert "other:blocks.1.hook_resid_post" in report.file("features.html").read_text()
    assert all(steps[name] in report.file("activations.html").read_text() for name in ("harvest", "other_store"))

    named = write(tmp_path / "again.yaml", saes={**saes, "other_store": first["harvest"]}, **sections)
    rows = json.loads(command("plan", named, "--json")[1])
    assert {row["action"] for row in rows if row["step"] in ("saes", "features")} == {"cached"}, "however it is named"


def test_a_training_goes_on_from_a_finished_one(command, first, tmp_path):  # noqa: F811
    sections = {"activations": first["harvest"], "features": FEATURES}
    short = write(tmp_path / "short.yaml", saes=SAES, **sections)
    assert command("run", short, "--no-prefect")[0] == 0
    begun = ids(command("plan", short, "--json")[1])["saes"]
    longer = {**SAES, "n_tokens": 2 * SAES["n_tokens"], "start_from": begun}
    recipe = write(tmp_path / "longer.yaml", saes=longer, **sections)
    code, out, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    assert re.search(rf"start_from +Given +{begun}  a training of 1 SAE, to go on from", out)
    rows = json.loads(command("plan", recipe, "--json")[1])
    assert {row["step"]: row["action"] for row in rows if row["step"] != "prompts"} == {
        "activations": "given",
        "start_from": "given",
        "saes": "cached",
        "features": "cached",
    }
    found = mi_pipe.open(ids(json.dumps(rows))["saes"])
    n_steps = SAES["n_tokens"] // SAES["batch_rows"]
    assert found.manifest.inputs["start"].id == begun
    assert (found.training["step"].min() > n_steps) & (found.training["step"].max() == 2 * n_steps)
    fvus = pd.concat([found.evaluation["fvu"], mi_pipe.open(begun).evaluation["fvu"]]).tolist()
    assert fvus[0] < fvus[1]
    weights = found.path / "saes" / found.names[0] / "weights.safetensors"
    before = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(b"damaged")
    assert command("repair", found.id)[0] == 0, "what it began from is found again by the manifest"
    assert weights.read_bytes() == before


def test_mistakes_are_one_sentence_before_any_work(command, first, tmp_path):  # noqa: F811
    harvest = first["harvest"]
    other = write(
        tmp_path / "other.yaml", train_model=toy(0), prompts={**PROMPTS, "seed": 5}, harvest=HARVEST, saes=SAES
    )
    assert command("run", other, "--no-prefect")[0] == 0
    foreign = ids(command("plan", other, "--json")[1])
    given = {"activations": harvest}
    planned = {"train_model": toy(2), "prompts": PROMPTS, "harvest": HARVEST}
    cases = [
        (given, {"hooks": [BOTH]}, "holds no activations of 'other:blocks.1.hook_resid_post'"),
        (given, {"hooks": [BOTH], "other_store": foreign["harvest"]}, "are other tokens than those of"),
        (given, {"other_store": first["prompts"]}, "saes.other_store: generate_prompts-"),
        (given, {"start_from": harvest}, "is no training of SAEs"),
        (given, {"start_from": foreign["saes"]}, "was trained with other activations"),
        ({"activations": foreign["harvest"]}, {"start_from": foreign["saes"]}, "ask for more"),
        ({"activations": foreign["harvest"]}, {"start_from": foreign["saes"], "k": 5}, "Give the same options"),
        (
            planned,
            {"hooks": ["other:blocks.1.hook_resid_pots"], "other_store": harvest},
            "Did you mean 'other:blocks.1.hook_resid_post",
        ),
        (planned, {"k": 49}, "k=49 is more than d_sae=48"),
    ]
    n_before = len(list((tmp_path / "store").glob("*/*/manifest.json")))
    for sections, options, message in cases:
        recipe = write(tmp_path / "r.yaml", saes={**SAES, **options}, **sections)
        code, _, err = command("run", recipe, "--no-prefect")
        assert code == 2, err
        assert message in only_line(err)
    assert len(list((tmp_path / "store").glob("*/*/manifest.json"))) == n_before
