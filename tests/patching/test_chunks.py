from dataclasses import replace

import numpy as np
import pytest

from mi_pipe.core.errors import HookPointError, PromptError
from mi_pipe.models.hook_points import HookMap, HookSite
from mi_pipe.patching.chunks import check_fits, choose_pairs, chunks_of
from mi_pipe.patching.units import DEFAULT_UNITS as UNITS
from mi_pipe.patching.units import present_units
from tests.patching.conftest import make_model
from tests.patching.pairs import random_pairs


def groups_of_two_lengths():
    return [
        replace(random_pairs(4, 6), pairs=np.array([0, 2, 4, 6])),
        replace(random_pairs(3, 8), pairs=np.array([1, 3, 5])),
    ]


def test_the_pairs_with_the_lowest_numbers_are_chosen():
    chosen = choose_pairs(groups_of_two_lengths(), 5)
    assert [group.pairs.tolist() for group in chosen] == [[0, 2, 4], [1, 3]]
    assert choose_pairs([], 5) == []
    assert sum(group.n_pairs for group in choose_pairs(groups_of_two_lengths(), None)) == 7


def test_chunks_hold_every_pair_once_in_order():
    groups = groups_of_two_lengths()
    chunks = chunks_of(groups, size=3)
    assert [chunk.group.n_pairs for chunk in chunks] == [3, 1, 3]
    assert [chunk.rows for chunk in chunks] == [slice(0, 3), slice(3, 4), slice(4, 7)]
    assert len({chunk.name for chunk in chunks}) == 3
    assert np.concatenate([chunk.group.clean[:, 0] for chunk in chunks]).tolist() == [
        *groups[0].clean[:, 0].tolist(),
        *groups[1].clean[:, 0].tolist(),
    ]


def test_prompts_that_do_not_fit_the_model_are_refused():
    info = make_model("native_attn_only").info
    check_fits([random_pairs(2, 8)], info, "task")
    with pytest.raises(PromptError, match="no pairs left"):
        check_fits([], info, "task")
    with pytest.raises(PromptError, match="prompts of 40 tokens; the model's context is 32"):
        check_fits([random_pairs(2, 40)], info, "task")
    with pytest.raises(PromptError, match="another model's tokenizer"):
        check_fits([random_pairs(20, 8, d_vocab=300)], info, "task")


def test_a_unit_that_only_the_bridge_reaches_is_refused_with_the_others_named():
    sites = [
        HookSite("blocks.0.hook_resid_pre", (4,), "h.0", "in"),
        HookSite("blocks.0.attn.hook_z", (1, 4), None, "in"),
    ]
    with pytest.raises(HookPointError, match=r"head_out .* Leave it out: units=\[resid_pre\]"):
        present_units(UNITS, HookMap(sites), 1)
    with pytest.raises(HookPointError, match="none of the units mlp_out"):
        present_units(["mlp_out"], HookMap(sites), 1)
