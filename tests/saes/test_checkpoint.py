import pytest
import torch

from mi_pipe.saes.checkpoint import Checkpoint, drop_checkpoint, load_checkpoint, save_checkpoint
from mi_pipe.saes.sweep import SAESpec
from tests.saes.planted import make_group, planted, train

HOOK = "blocks.0.hook_resid_post"


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("stop", [10, 30])
def test_going_on_from_a_checkpoint_gives_the_same_bits(architecture, stop, tmp_path):
    rows, _ = planted(512, d_in=8, n_features=12, n_active=2)
    spec = SAESpec(HOOK, architecture, 2, 32, 0)

    def group():
        made = make_group(rows, [spec], 40, 64)
        made.trainers[spec.name].params.b_enc[16:] = -2.0
        return made

    whole, first, second = group(), group(), group()
    curve = train(whole, rows, 40, 64, log_steps=5)
    assert max(row["dead_fraction"] for row in curve) > 0
    begun = train(first, rows, stop, 64, log_steps=5)
    save_checkpoint(tmp_path, Checkpoint(stop, first.state(), begun))
    found = load_checkpoint(tmp_path)
    second.load_state(found.tensors)
    rest = train(second, rows, 40, 64, first_step=found.step, log_steps=5)
    assert found.rows + rest == curve
    expected, actual = whole.state(), second.state()
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name


def test_a_checkpoint_without_its_pointer_leaves_the_older_one_in_force(tmp_path):
    save_checkpoint(tmp_path, Checkpoint(5, {"a": torch.ones(2)}, [{"step": 5}]))
    (tmp_path / "step-000000010.safetensors").write_bytes(b"torn")
    found = load_checkpoint(tmp_path)
    assert found.step == 5
    assert found.tensors["a"].tolist() == [1, 1]


def test_only_the_newest_checkpoint_is_kept_and_it_can_be_dropped(tmp_path):
    for step in (5, 10):
        save_checkpoint(tmp_path, Checkpoint(step, {"a": torch.ones(2)}, []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "step-000000010.safetensors"]
    drop_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path) is None
    assert not list(tmp_path.iterdir())
