import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mi_pipe.features.contexts import TokenMap, windows_around
from tests.features.dense_firings import firings_of, sparse_matrix


def token_map(lengths, stored, scored):
    """Prompts of these lengths, of whose tokens the stored ones are rows and the scored ones of these encoded."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompt = np.repeat(np.arange(len(lengths)), lengths)
    pos = np.arange(offsets[-1]) - offsets[prompt]
    token_ids = (np.arange(offsets[-1]) * 7 % 50).astype(np.int32)
    return TokenMap.build(token_ids, offsets, prompt[stored], pos[stored], scored)


def test_a_window_is_cut_at_the_prompts_ends_and_unscored_tokens_are_nan():
    """Two prompts of 4 tokens, the first token of each not stored; row 1 (prompt 0, pos 2) is massive."""
    tokens = token_map([4, 4], np.array([1, 2, 3, 5, 6, 7]), np.array([True, False, True, True, True, True]))
    dense = np.array([[1], [0], [0], [2], [0], [3]], np.float32)
    found = windows_around(firings_of(dense), tokens, np.array([0, 0]), np.array([0, 5]), 2, 1)
    assert found.starts.tolist() == [0, 3, 6]
    assert found.first_pos.tolist() == [0, 1]
    assert found.token_ids.tolist() == [0, 7, 14, 35, 42, 49]
    np.testing.assert_array_equal(found.activations, [np.nan, 1, np.nan, 2, 0, 3])


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(0, 15),
    st.integers(0, 15),
    st.integers(0, 1_000),
)
def test_every_window_equals_the_slice_of_the_dense_matrix(lengths, before, after, seed):
    rng = np.random.default_rng(seed)
    n_tokens = sum(lengths)
    stored = np.flatnonzero(rng.random(n_tokens) < 0.8)
    scored = rng.random(len(stored)) < 0.8
    tokens = token_map(lengths, stored, scored)
    dense = sparse_matrix(len(stored), 3, 0.6, seed) * scored[:, None]
    row, feature = np.nonzero(dense)
    found = windows_around(firings_of(dense, 4), tokens, feature + 4, row, before, after)
    on_tokens = np.full((n_tokens, 3), np.nan, np.float32)
    on_tokens[stored[scored]] = dense[scored]
    for i in range(len(row)):
        prompt = tokens.prompt_of_row[row[i]]
        begin, end = tokens.offsets[prompt], tokens.offsets[prompt + 1]
        here = stored[row[i]]
        window = slice(max(here - before, begin), min(here + after + 1, end))
        own = slice(found.starts[i], found.starts[i + 1])
        assert found.first_pos[i] == window.start - begin
        np.testing.assert_array_equal(found.token_ids[own], tokens.token_ids[window])
        np.testing.assert_array_equal(found.activations[own], on_tokens[window, feature[i]])
