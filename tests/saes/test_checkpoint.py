import pytest
import torch

from mi_pipe.saes.checkpoint import Checkpoint, drop_checkpoint, load_checkpoint, save_checkpoint
from tests.saes.planted import HOOK, batch, make_group, planted, spec_of
from tests.saes.test_training import ARCHITECTURES

N_STEPS, BATCH_ROWS = 40, 64
OPTIONS = {
    "plain": {},
    "all": {
        "dead_features": {"resample_steps": 8},
        "optimisation": {"average_decay": 0.9},
        "sparsity": {"k_start": 8},
    },
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stop", [1, 13, 30])
def test_going_on_from_a_checkpoint_gives_the_same_bits(architecture, stop, options, tmp_path):
    """Checkpoints lie within intervals of the curve (of 5 steps) as well as between them."""
    rows, _ = planted(512, d_in=8, n_features=12, n_active=2)
    spec = spec_of(architecture, 8, 2, 32)

    def group():
        made = make_group(rows, [spec], N_STEPS, BATCH_ROWS, log_steps=5, **OPTIONS[options])
        made.trainers[spec.name].params.b_enc[16:] = -2.0
        return made

    def steps(group, first, last):
        return [row for step in range(first, last) for row in group.step({HOOK: batch(rows, step, BATCH_ROWS)}, step)]

    whole, first, second = group(), group(), group()
    curve = steps(whole, 0, N_STEPS)
    begun = steps(first, 0, stop)
    save_checkpoint(tmp_path, Checkpoint(stop, first.state(), {"curve": begun}))
    found = load_checkpoint(tmp_path)
    second.load_state(found.tensors)
    assert found.rows["curve"] + steps(second, found.step, N_STEPS) == curve
    expected, actual = whole.state(), second.state()
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    for (_, mine), (_, theirs) in zip(whole.folded(), second.folded(), strict=True):
        assert torch.equal(mine.W_enc, theirs.W_enc)


def test_a_checkpoint_without_its_pointer_leaves_the_older_one_in_force(tmp_path):
    save_checkpoint(tmp_path, Checkpoint(5, {"a": torch.ones(2)}, {}))
    (tmp_path / "step-000000010.safetensors").write_bytes(b"torn")
    found = load_checkpoint(tmp_path)
    assert found.step == 5
    assert found.tensors["a"].tolist() == [1, 1]


def test_only_the_newest_checkpoint_is_kept_and_it_can_be_dropped(tmp_path):
    for step in (5, 10):
        save_checkpoint(tmp_path, Checkpoint(step, {"a": torch.ones(2)}, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "step-000000010.safetensors"]
    drop_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path) is None
    assert not list(tmp_path.iterdir())
