"""Texts under steering against a plain loop of hooks without a cache, and against transformers' own `generate`."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel

from mi_pipe.core.errors import ConfigError, HookPointError, PromptError
from mi_pipe.models.loading import wrap_hf_model
from mi_pipe.steering.contrast import from_contrast
from mi_pipe.steering.direction import Direction
from mi_pipe.steering.generation import Push, Sampling, continuations, uniform_draws
from mi_pipe.steering.steer import steer
from mi_pipe.steering.texts import Writing, steered_texts
from tests.patching.conftest import D_VOCAB, word_tokenizer

HOOK = "blocks.1.hook_resid_pre"
N_NEW = 7
GREEDY = Sampling(np.full((3, N_NEW), np.nan))


def prompts(n_pos: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, D_VOCAB, (3, n_pos)))


def vectors(width: int, size: float = 2.0) -> torch.Tensor:
    return size * torch.randn(3, width, generator=torch.Generator().manual_seed(5))


def plain_loop(model, tokens, hook, added, from_end, draws=None, temperature=1.0):
    """Write one row after the other with a hook of torch alone and no cache."""
    site = model.hooks[hook]
    module = model.module.get_submodule(site.module_path)
    found = []
    for row, (start, vector) in enumerate(zip(tokens, added, strict=True)):
        ids, first = start.tolist(), tokens.shape[1] - 1 if from_end else 0

        def pre(_module, args, kwargs, vector=vector, first=first):
            hidden = args[0] if args else kwargs["hidden_states"]
            moved = hidden.clone()
            moved[:, first:] += vector
            return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

        handle = module.register_forward_pre_hook(pre, with_kwargs=True)
        for i in range(N_NEW):
            with torch.no_grad():
                logits = model.logits(torch.tensor([ids]))[0, -1]
            if draws is None:
                ids.append(int(logits.argmax()))
            else:
                edges = np.cumsum(torch.softmax(logits.double() / temperature, -1).numpy())
                ids.append(int(np.argmax(edges > draws[row, i] * edges[-1])))
        handle.remove()
        found.append(ids[len(start) :])
    return found


def cut(rows):
    """End texts where the tests' tokenizer says so (token 1), as the models do."""
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


def test_cached_greedy_texts_are_those_of_a_plain_hook_loop(model):
    tokens, added = prompts(), vectors(model.info.d_model)
    for from_end in (False, True):
        expected = plain_loop(model, tokens, HOOK, added, from_end)
        expected = cut(expected) if isinstance(model.module, PreTrainedModel) else expected
        assert continuations(model, tokens, GREEDY, Push(HOOK, added, from_end)) == expected
        assert continuations(model, tokens, GREEDY) != expected


def test_a_model_without_keys_and_values_is_run_whole():
    config = MambaConfig(vocab_size=D_VOCAB, hidden_size=32, num_hidden_layers=3, state_size=4, initializer_range=0.5)
    torch.manual_seed(0)
    mamba = wrap_hf_model(AutoModelForCausalLM.from_config(config), word_tokenizer(), "mamba")
    tokens, added = prompts(), vectors(32)
    expected = [row[: row.index(0) + 1] if 0 in row else row for row in plain_loop(mamba, tokens, HOOK, added, False)]
    assert continuations(mamba, tokens, GREEDY, Push(HOOK, added, False)) == expected


def test_the_unsteered_text_is_that_of_generate(llama):
    tokens = prompts()
    for row, found in zip(tokens, continuations(llama, tokens, GREEDY), strict=True):
        whole = llama.module.generate(
            row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=N_NEW, do_sample=False, pad_token_id=2
        )
        assert found == cut([whole[0, 5:].tolist()])[0]


def test_samples_follow_the_probabilities_and_the_seed_alone(llama):
    tokens, added = prompts(), vectors(llama.info.d_model)
    draws = np.stack([uniform_draws(3, prompt, 0, N_NEW) for prompt in range(3)])
    sampling = Sampling(draws, temperature=0.7)
    expected = cut(plain_loop(llama, tokens, HOOK, added, False, draws, 0.7))
    assert continuations(llama, tokens, sampling, Push(HOOK, added, False)) == expected
    assert not np.array_equal(uniform_draws(3, 0, 0, 4), uniform_draws(4, 0, 0, 4))
    counts = np.zeros(D_VOCAB)
    one = Sampling(uniform_draws(1, 0, 0, 4000)[:, None])
    for (token,) in continuations(llama, tokens[:1].expand(4000, -1), one):
        counts[token] += 1
    with torch.no_grad():
        p = llama.logits(tokens[:1])[0, -1].softmax(-1).numpy()
    assert np.abs(counts / 4000 - p).max() < 0.04


def direction(width: int, scale: float = 3.0) -> Direction:
    return Direction.of(HOOK, torch.randn(width, generator=torch.Generator().manual_seed(1)), scale=scale)


def test_batches_and_companions_change_no_text_and_0_is_the_model(llama):
    rows = [np.array([0, 5, 9]), np.array([0, 7, 8, 4, 11]), np.array([0, 31, 9])]
    steering = direction(32)
    writing = Writing(n_tokens=6, n_samples=2, batch_tokens=1000)
    whole = steered_texts(llama, steering, [-2.0, 0.0, 1.0], rows, writing)
    assert len(whole) == 3 * 3 * 3
    small = steered_texts(llama, steering, [-2.0, 0.0, 1.0], rows, Writing(n_tokens=6, n_samples=2, batch_tokens=1))
    assert whole["text"].tolist() == small["text"].tolist()
    alone = steered_texts(llama, None, [0.0], rows, writing)
    assert alone["text"].tolist() == whole.loc[whole["coefficient"] == 0, "text"].tolist()
    assert set(whole["text"]) - set(alone["text"])


def test_one_call_steers_texts(llama):
    frame = steer(llama, direction(32), ["w5", "w7"], [1, 0], Writing(n_tokens=4))
    assert list(frame["coefficient"]) == [0, 0, 1, 1]
    assert list(frame["prompt_text"]) == ["w5", "w7"] * 2
    tokens = torch.tensor([[0, 5]])
    step = direction(32).step(1.0)[None]
    (expected,) = continuations(llama, tokens, Sampling(np.full((1, 4), np.nan)), Push(HOOK, step, False))
    assert frame.loc[2, "token_ids"].tolist() == expected


def test_a_direction_and_texts_take_two_lines(llama):
    found = steer(llama, from_contrast(llama, ["w5", "w9"], "w7", HOOK), "w5", 1.5, Writing(n_tokens=3))
    same = steer(llama, from_contrast(llama, [[0, 5], [0, 9]], [[0, 7]], HOOK), [[0, 5]], [1.5], Writing(n_tokens=3))
    assert found["token_ids"].tolist()[0].tolist() == same["token_ids"].tolist()[0].tolist()
    assert (len(found), found["prompt_text"][0], same["prompt_text"][0]) == (1, "w5", "w0 w5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": [1.0, float("nan")]}, "Coefficients are finite numbers, not 1, nan"),
        ({"prompts": [[0, 97]]}, "A prompt has token 97, and the model has tokens 0 to 96"),
        ({"prompts": [[-1]]}, "A prompt has token -1"),
        ({"prompts": [[]]}, "A prompt has no tokens"),
        ({"prompts": [[3] * 40]}, "A prompt of 40 tokens and 2 new ones are more than the model's context of 32"),
    ],
)
def test_mistakes_of_a_call_are_told_in_a_sentence(llama, options, message):
    with pytest.raises((ConfigError, PromptError), match=message):
        steer(llama, direction(32), **{"prompts": "w5", "writing": Writing(n_tokens=2), **options})
    with pytest.raises(ConfigError, match="cannot be written: at least one token"):
        Writing(n_tokens=0)
    with pytest.raises(ConfigError, match="temperature above 0"):
        Writing(temperature=0.0)
    with pytest.raises(PromptError, match="A prompt of 40 tokens is more than the model's context of 32"):
        from_contrast(llama, [[3] * 40], "w5", HOOK)


def test_what_does_not_fit_is_told(llama):
    with pytest.raises(ConfigError, match=r"has 31 values, and blocks\.1\.hook_resid_pre has 32"):
        steer(llama, direction(31), ["w5"])
    pattern = Direction.of("blocks.1.attn.hook_pattern", torch.ones(4))
    with pytest.raises(HookPointError, match="could be steered"):
        steer(llama, pattern, ["w5"])
    with pytest.raises(PromptError, match="more than the model's context of 32"):
        steer(llama, direction(32), ["w5"], writing=Writing(n_tokens=40))
    with pytest.raises(ConfigError, match="points nowhere"):
        Direction.of(HOOK, torch.zeros(32))
