"""What a harvest will take is told before it begins, and what cannot fit is refused with what would."""

import shutil

import pytest

from flows.forecast import measured_speed
from flows.preflight import prepare
from mi_pipe.core.errors import DiskSpaceError
from mi_pipe.core.stage import execute
from mi_pipe.prompts.prompt_set import PromptSet
from stages import generate_prompts
from tests.models.tiny import save_tiny_llama


def prepared(store, *overrides):
    return prepare("tiny", ["harvest.hooks=['blocks.{0,1}.hook_resid_post']", *overrides], str(store.root))


def test_rows_and_bytes_are_foretold_from_the_config(store):
    (forecast,) = prepared(store, "prompts.n_prompts=1000").forecasts
    assert not forecast.is_exact
    assert forecast.n_tokens == 1000 * 97, "BOS and periods of up to 48, twice"
    assert forecast.row_bytes == {f"blocks.{layer}.hook_resid_post": 128 for layer in (0, 1)}
    assert forecast.size_bytes == forecast.n_tokens * 256
    assert forecast.free_bytes == pytest.approx(shutil.disk_usage(store.root.parent).free, rel=0.1)
    text = "\n".join(forecast.lines(1000.0))
    assert "are free" in text
    assert "blocks.1.hook_resid_post" in text
    assert "1.6 minutes at 1,000 tokens a second" in text


def test_a_harvest_that_cannot_fit_is_refused_with_ways_to_shrink_it(store):
    with pytest.raises(DiskSpaceError, match=r"harvest needs .* It fits with [\d,]+ tokens \(prompts\.n_tokens\)"):
        prepared(store, "prompts.n_prompts=9_000_000_000")
    free = shutil.disk_usage(store.root.parent).free
    n_prompts = int(1.5 * free / 256 / 97)
    with pytest.raises(DiskSpaceError, match=r"1 of the 2 hook points .* one token in 2") as raised:
        prepared(store, f"prompts.n_prompts={n_prompts}")
    assert "s3://bucket/prefix" in str(raised.value)


def test_nothing_is_refused_where_shards_go_to_an_object_store(store):
    (forecast,) = prepared(store, "prompts.n_prompts=9_000_000_000", "harvest.destination=s3://b/p").forecasts
    assert forecast.free_bytes is None
    assert "s3://b/p" in forecast.lines(None)[0]


def test_speed_is_measured_with_the_recipes_own_model(tmp_path, store):
    save_tiny_llama(tmp_path / "llama")
    words = [
        f"model.name={tmp_path / 'llama'}",
        "harvest.hooks=[blocks.1.hook_resid_post]",
        "saes=null",
        "features=null",
    ]
    ready = prepare("smollm2", [*words, "prompts.n_tokens=4096", "prompts.window=32"], str(store.root))
    (forecast,) = ready.forecasts
    assert measured_speed(forecast, ready.hooks, store) > 100


def test_once_prompts_exist_the_number_is_exact(store):
    ready = prepared(store, "prompts.n_prompts=40")
    for step in ready.steps[:1]:
        execute(step.stage, step.config, step.stage.inputs(), store)
    prompts = next(step for step in ready.steps if step.label == "prompts")
    from mi_pipe.opening import open_artifact

    inputs = generate_prompts.Inputs(model=open_artifact(store.folder(prompts.inputs["model"].id)))
    found = PromptSet(execute(prompts.stage, prompts.config, inputs, store).artifact.path)
    (forecast,) = prepared(store, "prompts.n_prompts=40").forecasts
    assert forecast.is_exact
    assert forecast.n_tokens == found.n_tokens
