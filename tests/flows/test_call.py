"""Recipes as one Python call."""

import subprocess
import sys

import pytest

import flows
from mi_pipe.core.errors import ConfigError, StageError
from mi_pipe.patching.effects import PatchEffects

TOY = {"n_steps": 20, "seed": 0, "model": {"d_model": 32, "n_heads": 4}}
SECTIONS = {
    "train_model": TOY,
    "tasks": {"mine": {"family": "induction", "n_pairs": 6}},
    "patch": {"units": ["head_out"], "device": "cpu"},
}


def test_a_call_gives_opened_artifacts_by_name_and_makes_nothing_twice(store, capsys):
    found = flows.run(SECTIONS, store=store.root)
    assert list(found) == ["model", "prompts.mine", "patch.mine"]
    effects = found["patch.mine"]
    assert isinstance(effects, PatchEffects)
    assert effects.recovered("head_out").sizes == {"layer": 2, "head": 4}
    capsys.readouterr()
    again = flows.run(SECTIONS, store=store.root)
    assert {name: item.digest for name, item in again.items()} == {name: item.digest for name, item in found.items()}
    assert capsys.readouterr().out.count("Cached") == 3
    other = flows.run(SECTIONS, ["patch.direction=noising"], store=store.root)
    assert other["patch.mine"].id != effects.id
    assert other["model"].id == found["model"].id


def test_the_sections_that_are_given_stay_as_they_are(store):
    sections = {**SECTIONS, "patch": None}
    flows.run(sections, ["patch.units=[resid_pre]", "patch.device=cpu"], store=store.root)
    assert sections == {**SECTIONS, "patch": None}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({**SECTIONS, "patch": {"unit": ["head_out"]}}, "the recipe.*Did you mean 'units'"),
        ({"patch": {}, "train_model": TOY}, "the recipe.*needs a section 'tasks'"),
    ],
)
def test_mistakes_are_told_before_any_work(store, sections, message):
    with pytest.raises(ConfigError, match=message):
        flows.run(sections, store=store.root)
    assert not list(store.published_ids())


def test_failed_steps_are_named_and_the_others_are_made(store):
    sections = {**SECTIONS, "heads": {}, "patch": {"units": ["mlp_out"]}}
    with pytest.raises(StageError, match=r"1 of 4 steps failed\. patch\.mine: "):
        flows.run(sections, store=store.root)
    assert any(name.startswith("heads-") for name in store.published_ids())


@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("flows", {"torch", "prefect", "dask"}),
        ("flows.diagram", {"transformers.modeling_utils", "transformer_lens", "torch._dynamo", "prefect"}),
    ],
)
def test_importing_what_a_plan_needs_loads_nothing_that_takes_seconds(imported, heavy):
    code = f"import {imported}, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
