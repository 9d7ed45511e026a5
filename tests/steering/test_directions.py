"""Directions against numpy: differences of means, features, scales, choices of prompts."""

import numpy as np
import pytest
import torch

from mi_pipe.core.errors import ConfigError, PromptError
from mi_pipe.core.store import Store
from mi_pipe.models.trained import TrainedModel
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites
from mi_pipe.steering.choosing import held_out, prompts_where
from mi_pipe.steering.contrast import from_contrast, usual_activations
from mi_pipe.steering.direction import Direction, from_feature, random_like
from mi_pipe.steering.scales import norm_scaled, reach_scaled
from tests.stages.toys import toy_corpus, toy_model, toy_task

HOOK = "blocks.1.hook_resid_pre"
POSITIVE = [np.array([0, 5, 9, 4]), np.array([0, 7]), np.array([0, 8, 30])]
NEGATIVE = [np.array([0, 50, 90, 40]), np.array([0, 70, 20])]


def residuals(model, prompts) -> list[np.ndarray]:
    """Each prompt's values, prompt by prompt, by torch's own hook."""
    found = []
    module = model.module.model.layers[1]
    for prompt in prompts:
        handle = module.register_forward_pre_hook(
            lambda _m, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"])[0].double().numpy()),
            with_kwargs=True,
        )
        with torch.no_grad():
            model.logits(torch.from_numpy(prompt)[None])
        handle.remove()
    return found


@pytest.mark.parametrize("position", ["last", "all"])
def test_a_contrast_is_the_difference_of_means(llama, position):
    rows = slice(-1, None) if position == "last" else slice(1, None)
    means = [np.concatenate([x[rows] for x in residuals(llama, side)]).mean(0) for side in (POSITIVE, NEGATIVE)]
    difference = means[0] - means[1]
    found = from_contrast(llama, POSITIVE, NEGATIVE, HOOK, position, batch_tokens=5)
    np.testing.assert_allclose(found.step(1.0), difference, rtol=1e-4, atol=1e-5)
    assert found.scale == pytest.approx(np.linalg.norm(difference), rel=1e-5)
    assert found.unit.dtype == torch.float32
    assert float(found.unit.norm()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found.step(-2.0), -2 * found.step(1.0))


def test_equal_sides_point_nowhere_and_empty_ones_have_no_mean(llama):
    with pytest.raises(ConfigError, match="points nowhere"):
        from_contrast(llama, POSITIVE, POSITIVE, HOOK)
    with pytest.raises(PromptError, match="no tokens beside BOS"):
        from_contrast(llama, [np.array([0])], NEGATIVE, HOOK, "all")


def make_sae(sites: Sites) -> SAE:
    n_in, n_out = sum(sites.input_widths), sum(sites.output_widths)
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=draw) for shape in ((n_in, 6), (6,), (6, n_out), (n_out,))]
    return SAE(*weights, rule=InferenceRule(kind="threshold", threshold=torch.tensor(0.0)), name="s", sites=sites)


def test_a_feature_steers_along_its_decoder_row():
    sae = make_sae(Sites.of_sae(HOOK, 32))
    found = from_feature(sae, 3)
    assert found.hook == HOOK
    torch.testing.assert_close(found.step(2.0), 2 * sae.W_dec[3].detach())
    both = Sites((HOOK, "x"), (HOOK, "x"), (32, 4), (32, 4))
    crosscoder = make_sae(both)
    torch.testing.assert_close(from_feature(crosscoder, 1, "x").step(1.0), crosscoder.W_dec[1, 32:].detach())
    with pytest.raises(ConfigError, match="say at which"):
        from_feature(crosscoder, 1)
    with pytest.raises(ConfigError, match="features 0 to 5, not 6"):
        from_feature(sae, 6)
    with pytest.raises(ConfigError, match="not y"):
        from_feature(sae, 2, "y")


def test_scales_are_measured_without_bos(llama):
    rows = np.concatenate([x[1:] for x in residuals(llama, POSITIVE)])
    sae = make_sae(Sites.of_sae(HOOK, 32))
    direction = from_feature(sae, 3)
    assert norm_scaled(llama, direction, POSITIVE).scale == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-5)
    pre = (rows - sae.b_dec.numpy()) @ sae.W_enc.numpy() + sae.b_enc.numpy()
    reach = reach_scaled(llama, direction, sae, 3, POSITIVE)
    assert reach.scale == pytest.approx(pre[:, 3].max() * float(sae.W_dec[3].norm()), rel=1e-4)
    sae.b_enc[3] = -1e6
    with pytest.raises(ConfigError, match="Feature 3 of s fires nowhere"):
        reach_scaled(llama, direction, sae, 3, POSITIVE)


def test_massive_tokens_do_not_count_for_scales(llama):
    everything = usual_activations(llama, [HOOK], POSITIVE)
    with torch.no_grad():
        llama.module.model.embed_tokens.weight[30] *= 1e4
        without = usual_activations(llama, [HOOK], POSITIVE)
        llama.module.model.embed_tokens.weight[30] /= 1e4
    assert (len(everything), len(without)) == (6, 5)


def test_controls_have_the_same_steps_elsewhere():
    direction = Direction.of(HOOK, torch.ones(4), scale=3.0)
    control = random_like(direction, 1)
    assert (control.scale, control.hook, control.kind) == (3.0, HOOK, "random")
    assert torch.equal(control.unit, random_like(direction, 1).unit)
    assert not torch.equal(control.unit, random_like(direction, 2).unit)


def test_prompts_are_chosen_by_conditions_and_held_out_from_contrasts(store: Store):
    model = TrainedModel(toy_model(store).path)
    task = PromptSet(toy_task(store, model, places={"io": 1}).path)
    assert prompts_where(task, "role == 'clean'", None).tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert prompts_where(task, "role == 'clean' and n_tokens > 6", 2).tolist() == [2, 6]
    assert prompts_where(task, "pos_io == 1 and pair == 3", None).tolist() == [6, 7]
    with pytest.raises(ConfigError, match="no column 'rol'"):
        prompts_where(task, "rol == 'clean'", None)
    with pytest.raises(PromptError, match="No prompt of"):
        prompts_where(task, "role == 'neither'", None)
    chosen = held_out(task, 6, seed=0, without=[task.prompt(0), task.prompt(2)])
    assert len(chosen) == 6
    assert not {0, 2} & set(chosen.tolist())
    assert chosen.tolist() == sorted(chosen)
    assert held_out(task, 6, seed=1).tolist() != held_out(task, 6, seed=0).tolist()
    corpus = PromptSet(toy_corpus(store, model).path)
    with pytest.raises(PromptError, match="contrasts use them all"):
        held_out(corpus, 2, 0, without=[corpus.prompt(i) for i in range(corpus.n_prompts)])
