"""Recipes that patch parts of SAEs: wired, run and cached; mistakes are one sentence before any work."""

import pytest

import mi_pipe
from tests.flows.test_cli import command, only_line  # noqa: F401 (a fixture)
from tests.flows.test_given import ids, write

TOY = {"n_steps": 20, "seed": 0, "model": {"d_model": 32, "n_heads": 4}}
PAIRS = {"family": "induction", "n_pairs": 40}
HOOK = "blocks.1.hook_resid_post"
HARVEST = {"hooks": ["blocks.*.hook_resid_post"], "precision": "float32", "device": "cpu"}
SAES = {
    "hooks": [HOOK],
    "architecture": "topk",
    "k": 4,
    "d_sae": 64,
    "n_tokens": 2000,
    "batch_rows": 256,
    "device": "cpu",
}
PATCH = {"units": ["sae_feature", "sae_error"], "features": 3, "max_pairs": 2, "device": "cpu"}
SECTIONS = {"train_model": TOY, "prompts": PAIRS, "tasks": {"mine": PAIRS}, "harvest": HARVEST, "patch": PATCH}


def test_a_recipe_patches_the_saes_that_it_trains_and_those_that_are_there(command, tmp_path):  # noqa: F811
    recipe = write(tmp_path / "r.yaml", **SECTIONS, saes=SAES)
    code, _, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    steps = ids(command("plan", recipe, "--json")[1])
    found = mi_pipe.open(steps["patch.mine"])
    assert found.manifest.inputs["saes"].id == steps["saes"]
    assert found.to_xarray().attrs["sae_hooks"] == ["", HOOK]
    assert list(steps).index("saes") < list(steps).index("patch.mine")
    given = {name: SECTIONS[name] for name in ("train_model", "tasks", "patch")}
    again = ids(command("plan", write(tmp_path / "g.yaml", **given, trained_saes=steps["saes"]), "--json")[1])
    assert again["patch.mine"] == steps["patch.mine"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "add a section 'saes' or 'trained_saes'"),
        ({"saes": {**SAES, "k": [4, 8]}}, "are both of layer 1"),
        ({"saes": {**SAES, "hooks": [f"{HOOK} -> blocks.0.hook_resid_post"]}}, "is a transcoder"),
        ({"saes": SAES, "patch": {**PATCH, "saes": ["blocks.0.hook_resid_post"]}}, "no SAE 'blocks.0.hook_resid_post'"),
        ({"saes": SAES, "patch": {**PATCH, "features": [64]}}, "has features 0 to 63"),
    ],
)
def test_what_cannot_be_patched_is_told_before_any_work(command, tmp_path, sections, message):  # noqa: F811
    code, out, err = command("run", write(tmp_path / "bad.yaml", **{**SECTIONS, **sections}), "--no-prefect")
    assert code == 2, (out, err)
    assert message in only_line(err)
