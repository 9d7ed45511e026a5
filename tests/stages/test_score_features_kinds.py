"""Features of transcoders and crosscoders, under every inference rule, against the dense encoding of all rows."""

import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.features import scored_saes
from mi_pipe.features.feature_set import FeatureSet
from mi_pipe.models.source import load_source
from mi_pipe.models.trained import TrainedModel
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.prompts.repeated import RepeatedConfig
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import CONFIG_FILE, EVALUATION_FILE, PROBE_FILE, WEIGHTS_FILE, SAESet
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.storage import make_probe, sae_config, sae_tensors
from stages import generate_prompts, harvest, score_features
from tests.stages.scored_toy import CONFIG
from tests.stages.toys import publish, toy_model

FIRST, SECOND, HEADS = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
WIDTH, D_SAE = 32, 40
_VECTOR = torch.linspace(0.5, 2.0, D_SAE)
PLACES = {
    "gated": ((FIRST,), (FIRST,)),
    "transcoder": ((HEADS,), (SECOND,)),
    "crosscoder": ((FIRST, SECOND), (FIRST, SECOND)),
    "to_heads": ((FIRST,), (HEADS,)),
}
RULES = {
    "gated": InferenceRule("gated", r_mag=_VECTOR - 1, b_mag=_VECTOR),
    "transcoder": InferenceRule("threshold", threshold=_VECTOR),
    "crosscoder": InferenceRule("topk", k=4),
    "to_heads": InferenceRule("threshold", threshold=torch.tensor(1.0)),
    "two_models": InferenceRule("topk", k=4),
}


def random_sae(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> SAE:
    generator = torch.Generator().manual_seed(len(name))
    sites = Sites(inputs, outputs, (WIDTH,) * len(inputs), (WIDTH,) * len(outputs))
    d_in, d_out = WIDTH * len(inputs), WIDTH * len(outputs)
    W_enc, W_dec = (torch.randn(*shape, generator=generator) for shape in ((d_in, D_SAE), (D_SAE, d_out)))
    W_dec[:, :WIDTH] *= torch.linspace(0, 1, D_SAE)[:, None]
    b_dec = torch.randn(d_out, generator=generator)
    is_transcoder = inputs != outputs
    return SAE(
        W_enc,
        torch.zeros(D_SAE),
        W_dec,
        b_dec,
        RULES[name],
        name=name,
        sites=sites,
        subtract_b_dec=not is_transcoder,
        W_skip=torch.randn(d_out, d_in, generator=generator) if is_transcoder else None,
    )


def publish_saes(store: Store, name: str, places: dict) -> SAESet:
    saes = [random_sae(key, *place) for key, place in places.items()]

    def fill(work) -> None:
        probes = {sae.name: make_probe(sae, torch.randn(4, sae.d_in)) for sae in saes}
        for sae in saes:
            work.write_json(f"saes/{sae.name}/{CONFIG_FILE}", sae_config(sae, 0, probes[sae.name]))
            work.write_tensors(f"saes/{sae.name}/{WEIGHTS_FILE}", sae_tensors(sae))
        work.write_tensors(PROBE_FILE, {f"{n}.{part}": x for n, probe in probes.items() for part, x in probe.items()})
        work.write_table(EVALUATION_FILE, pd.DataFrame({"sae": [sae.name for sae in saes], "l0": 4.0}))

    return SAESet(publish(store, "train_saes", name, fill, {}))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def inputs(shared):
    """A store in which other rows are massive at each hook point, and an SAE of each kind."""
    model = TrainedModel(toy_model(shared).path)
    corpus = RepeatedConfig(n_prompts=40, length=30, max_period=12)
    prompts = PromptSet(execute(generate_prompts.STAGE, corpus, generate_prompts.Inputs(model), shared).artifact.path)
    wanted = harvest.HarvestConfig(
        hooks=[FIRST, SECOND, HEADS], precision="float32", store_dtype="float32", massive_factor=1.3, device="cpu"
    )
    activations = ActivationStore(execute(harvest.STAGE, wanted, harvest.Inputs(model, prompts), shared).artifact.path)
    return score_features.Inputs(model, prompts, activations, publish_saes(shared, "a" * 16, PLACES))


@pytest.fixture(scope="module")
def scored(shared, inputs) -> FeatureSet:
    return FeatureSet(execute(score_features.STAGE, CONFIG, inputs, shared).artifact.path)


def dense(store: ActivationStore, sae: SAE) -> np.ndarray:
    """Encode all rows at once; rows that are massive at any of the SAE's hook points are NaN."""
    x = np.concatenate([store.read_rows(hook, 0, store.n_rows) for hook in sae.sites.inputs], axis=1)
    latent = sae.encode(torch.from_numpy(x)).numpy()
    for hook in sae.sites.hooks:
        latent[store.massive(hook)] = np.nan
    return latent


@pytest.mark.parametrize("name", list(PLACES))
def test_figures_are_those_of_the_dense_latents(inputs, scored, name):
    sae = inputs.saes[name]
    latent = dense(inputs.activations, sae)
    kept = latent[~np.isnan(latent[:, 0])]
    frame, row = scored.features(name), scored.saes.set_index("sae").loc[name]
    assert (kept > 0).any()
    assert 0 < row["n_massive"] == len(latent) - len(kept)
    np.testing.assert_array_equal(frame["n_firings"], (kept > 0).sum(0))
    np.testing.assert_allclose(frame["max_activation"], kept.max(0), rtol=1e-4)
    assert row["l0"] == pytest.approx((kept > 0).sum(1).mean())
    assert (row["hook"], row["kind"]) == (sae.sites.label, sae.sites.kind)
    feature = int(frame["density"].argmax())
    found = scored.latents(name, feature)
    assert found["row"].tolist() == np.flatnonzero(latent[:, feature] > 0).tolist()


def test_rows_are_read_in_pieces_no_larger_than_asked(inputs, monkeypatch):
    store, sites = inputs.activations, inputs.saes["crosscoder"].sites
    monkeypatch.setattr(scored_saes, "_READ_BYTES", 4 * 2 * WIDTH * 100)
    kept = scored_saes.is_scored(store, sites)
    pieces = list(scored_saes.read_pieces(store, sites, kept, 50, 1000))
    assert len(pieces) == 10
    assert max(len(rows) for rows, _ in pieces) <= 100
    rows = np.concatenate([rows for rows, _ in pieces])
    assert rows.tolist() == [row for row in range(50, 1000) if kept[row]]
    whole = np.concatenate([store.take(hook, rows) for hook in (FIRST, SECOND)], axis=1)
    np.testing.assert_array_equal(np.concatenate([values for _, values in pieces]), whole)


def test_a_crosscoder_leaves_out_more_rows_than_its_hook_points_alone(inputs, scored):
    store = inputs.activations
    alone = [int(store.massive(hook).sum()) for hook in (FIRST, SECOND)]
    assert scored.saes.set_index("sae").loc["crosscoder", "n_massive"] > max(alone)


@pytest.mark.parametrize(
    ("name", "hook", "part"), [("gated", FIRST, 0), ("transcoder", SECOND, 0), ("crosscoder", SECOND, 1)]
)
def test_logit_effects_are_of_what_reaches_the_logits_last(inputs, scored, name, hook, part):
    model = load_source(inputs.model, "cpu")
    direction = inputs.saes[name].W_dec[7, part * WIDTH : (part + 1) * WIDTH]
    effect = ((direction - direction.mean()) * model.final_norm.weight) @ model.W_U
    found = scored.logit_effects(name, 7)
    promoted = found[found["sign"] == "promoted"]
    np.testing.assert_allclose(promoted["effect"], effect.topk(CONFIG.n_logits).values, rtol=1e-3)
    assert scored.saes.set_index("sae").loc[name, "effects_of"] == hook


def test_a_transcoder_that_writes_no_residual_stream_has_no_effects(scored):
    assert scored.logit_effects("to_heads", 7).empty
    assert scored.saes.set_index("sae").loc["to_heads", "effects_of"] == ""


def test_decoder_norms_are_those_on_normalised_activations(inputs, scored):
    """Each hook point's scale is computed here from the rows themselves."""
    store, sae = inputs.activations, inputs.saes["crosscoder"]
    found = scored.decoder_norms("crosscoder")
    scaled = []
    for i, hook in enumerate((FIRST, SECOND)):
        x = store.read_rows(hook, 0, store.n_rows)[~store.massive(hook)].astype(np.float64)
        scale = np.sqrt(WIDTH / ((x - x.mean(0)) ** 2).sum(1).mean())
        norm = sae.W_dec[:, i * WIDTH : (i + 1) * WIDTH].norm(dim=1).numpy()
        here = found[found["hook"] == hook]
        assert here["feature"].tolist() == list(range(D_SAE))
        np.testing.assert_allclose(here["norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(here["scaled_norm"], norm * scale, rtol=1e-4)
        scaled.append(norm * scale)
    relative = found[found["hook"] == SECOND]["share"]
    np.testing.assert_allclose(relative, scaled[1] / (scaled[0] + scaled[1]), rtol=1e-4)
    assert relative.iloc[0] == 1, "feature 0 writes nothing at the first hook point"
    assert scored.decoder_norms("transcoder").empty


@pytest.fixture(scope="module")
def two_models(shared, inputs):
    """A crosscoder of two models beside the SAEs of one, and the second store: another toy on the same tokens."""
    model = TrainedModel(toy_model(shared, attn_only=False).path)
    wanted = harvest.HarvestConfig(
        hooks=[FIRST], precision="float32", store_dtype="float32", massive_factor=1.5, device="cpu"
    )
    other = ActivationStore(execute(harvest.STAGE, wanted, harvest.Inputs(model, inputs.prompts), shared).artifact.path)
    places = {"two_models": ((FIRST, f"other:{FIRST}"),) * 2, "gated": PLACES["gated"]}
    return replace(inputs, saes=publish_saes(shared, "b" * 16, places), other=other)


def test_a_crosscoder_of_two_models_reads_both_stores(shared, two_models):
    scored = FeatureSet(execute(score_features.STAGE, CONFIG, two_models, shared).artifact.path)
    first, other, sae = two_models.activations, two_models.other, two_models.saes["two_models"]
    x = np.concatenate([store.read_rows(FIRST, 0, first.n_rows) for store in (first, other)], axis=1)
    latent = sae.encode(torch.from_numpy(x)).numpy()[~(first.massive(FIRST) | other.massive(FIRST))]
    np.testing.assert_array_equal(scored.features("two_models")["n_firings"], (latent > 0).sum(0))
    assert scored.saes.set_index("sae").loc["two_models", "effects_of"] == FIRST
    assert list(scored.decoder_norms("two_models")["hook"].unique()) == [FIRST, f"other:{FIRST}"]


def test_without_the_second_store_the_rest_is_scored_and_the_log_says_so(shared, two_models, caplog):
    with caplog.at_level(logging.WARNING):
        made = execute(score_features.STAGE, CONFIG, replace(two_models, other=None), shared).artifact
    assert FeatureSet(made.path).names == ["gated"]
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if "two_models" in text] == [
        f"{two_models.saes.id}: no second store of activations (saes.other_store) is given, which two_models read; "
        "not scored"
    ]


def test_if_nothing_is_left_to_score_it_is_an_error(shared, two_models):
    places = {"two_models": ((FIRST, f"other:{FIRST}"),) * 2}
    alone = replace(two_models, saes=publish_saes(shared, "c" * 16, places), other=None)
    with pytest.raises(ConfigError, match="Nothing can be scored: no second store"):
        execute(score_features.STAGE, CONFIG, alone, shared)
