import numpy as np
import pytest
import torch

from mi_pipe.heads.prompt_attention import (
    HABITS,
    attention_habits,
    between_places,
    measure_attention,
    named_positions,
)
from tests.circuits.tiny import model, pairs
from tests.heads.patterns import previous_pattern


def test_habits_of_a_worked_example():
    pattern = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.3, 0.2]])[None, None]
    found = dict(zip(HABITS, attention_habits(pattern)[0, 0].tolist(), strict=True))
    rows = [[0.25, 0.75], [0.5, 0.3, 0.2]]
    assert found["attention_entropy"] == pytest.approx(sum(-p * np.log(p) for row in rows for p in row) / 3)
    assert found["first_token_share"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["mean_distance"] == pytest.approx((0.25 * 1 + 0.5 * 2 + 0.3 * 1) / 2)
    assert found["previous_token"] == pytest.approx((0.25 + 0.3) / 2)


def test_a_previous_token_head_looks_one_back():
    found = dict(zip(HABITS, attention_habits(previous_pattern(6)[None, None])[0, 0].tolist(), strict=True))
    assert found == {"attention_entropy": 0, "first_token_share": 0.2, "mean_distance": 1, "previous_token": 1}


def test_places_have_the_end_last_and_what_follows_the_subject():
    found = named_positions({"end": np.array([9, 8]), "s1": np.array([3, -1]), "io": np.array([1, 2])}, 10)
    assert list(found) == ["io", "s1", "s1+1", "end"]
    assert found["s1+1"].tolist() == [4, -1]
    at_the_end = named_positions({"s1": np.array([3, 8])}, 9)
    assert at_the_end["s1+1"].tolist() == [4, -1], "no position follows the last"


def test_attention_between_places_is_read_pair_by_pair_and_nan_where_there_is_none():
    pattern = torch.rand(2, 3, 5, 5)
    places = torch.tensor([[1, 4], [3, -1]])
    found = between_places(pattern, places)
    torch.testing.assert_close(found[0, :, 1, 0], pattern[0, :, 4, 1])
    torch.testing.assert_close(found[1, :, 0, 0], pattern[1, :, 3, 3])
    assert found[0, :, 0, 1].isnan().all(), "a key after the query"
    assert found[1, :, 1, 0].isnan().all(), "a place that this prompt lacks"


def test_measured_attention_is_the_bridges():
    here, prompts = model("llama_gqa"), pairs().clean
    places = np.array([[0, 2, 5]] * 3)
    found = measure_attention(here, prompts, places)
    _, cache = here.bridge.run_with_cache(prompts)
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        np.testing.assert_allclose(found.places[:, layer, :, 2, 1], pattern[:, :, 5, 2].detach(), atol=1e-6)
        back = torch.arange(6)[:, None] - torch.arange(6)
        distance = (pattern * back).sum(-1)[:, :, 1:].mean(-1)
        np.testing.assert_allclose(found.habits[:, layer, :, 2], distance.detach(), atol=1e-5)
