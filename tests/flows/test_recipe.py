"""Recipes: overrides, and mistakes answered with place and near name."""

from pathlib import Path

import pytest

from flows.recipe import load_recipe, recipe_path
from mi_pipe.core.errors import ConfigError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in recipe_path("tiny").parent.glob("*.yaml")))
def test_every_recipe_that_ships_is_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(name, [f"description={recipe.description!r}"]).identity() == recipe.identity()


def test_overrides_change_one_value_and_may_add_or_drop_sections():
    recipe = load_recipe("tiny", ["saes.k=[4, 8]", "features=null", "heads.seed=3"])
    assert recipe.saes is not None
    assert list(recipe.saes.k) == [4, 8]
    assert recipe.features is None
    assert recipe.heads is not None
    assert recipe.heads.seed == 3


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train_model: {}\nharvset: {}\n", [], r"r\.yaml, line 2: unknown key 'harvset'\. Did you mean 'harvest'"),
        ("train_model:\n  sede: 1\n", [], r"line 2: unknown key 'train_model\.sede'\. Did you mean 'seed'"),
        (
            "train_model: {}\nprompts:\n  family: corpus\n  windw: 3\n",
            [],
            r"line 4: unknown key 'prompts\.windw'\. Did you mean 'window'",
        ),
        ("train_model: {}\nheads:\n  n_sequences: many\n", [], r"line 3: 'heads\.n_sequences' is 'many'; "),
        ("train_model: {}\n", ["heads.n_sequencs=3"], r"override 'heads\.n_sequencs=3': unknown key .* Did you mean"),
        ("train_model: {}\n", ["heads"], r"An override is written key\.path=value"),
        ("train_model: {}\n", ["name.x.y=1"], r"goes below 'name', which is no section"),
        ("train_model: {}\nfeatures: {}\n", [], r"section 'features' needs a section 'saes'"),
        ("heads: {}\n", [], r"section 'heads' needs a section 'tasks'"),
        (
            "activations: 3f\ntrain_model:\n",
            ["harvest={hooks: [a]}", "prompts={family: corpus}"],
            r"both 'harvest' and",
        ),
        ("activations:\nsaes: {}\ntrain_model:\n", [], r"'saes' needs a section 'harvest' or 'activations'"),
        ("activations: 3f\nheads:\ntasks: {a: {family: induction}}\n", [], r"must name a model .* it has neither"),
        ("{}\n", [], r"must name a model .* it has neither"),
        ("model: {name: gpt2}\ntrain_model: {}\n", [], r"it has both"),
        ("a: [\n", [], r"line \d is not YAML"),
        ("- 1\n", [], r"must hold sections"),
        (
            "train_model: {}\ntasks: {a: {family: induction}}\npatch: {tasks: [b]}\n",
            [],
            r"patch\.tasks names 'b', which is no task of the recipe \(a\)",
        ),
    ],
)
def test_mistakes_are_told_with_place_and_near_name(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text), overrides)


def test_a_recipe_that_is_not_utf8_is_told_so(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_recipe(str(path))


def test_an_unknown_recipe_is_answered_with_near_names():
    with pytest.raises(ConfigError, match=r"no recipe 'smolm2'\. Did you mean 'smollm2'"):
        recipe_path("smolm2")


def test_activations_need_no_model_but_may_have_one(tmp_path):
    text = "activations: harvest-3f\nsaes:\nfeatures:\nreport:\n"
    assert not load_recipe(write(tmp_path, text)).needs_model
    assert load_recipe(write(tmp_path, text), ["model.name=gpt2"]).model.name == "gpt2"


def test_a_bare_section_in_a_file_runs_with_defaults(tmp_path):
    text = "train_model:\ntasks: {a: {family: induction}}\nheads:\n"
    assert load_recipe(write(tmp_path, text)).heads is not None
