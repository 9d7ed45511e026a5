import math

import numpy as np
import torch

from mi_pipe.patching.metrics import effect_fraction, logit_diff, lost_fraction, recovered_fraction


def test_logit_diff_of_a_worked_example():
    logits = torch.tensor([[1.0, 2.5, -1.0], [0.0, 4.0, 3.0]])
    found = logit_diff(logits, torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert found.tolist() == [1.5, -1.0]


def test_fractions_of_a_worked_example():
    # Five patched values between corrupted -1 and clean 3, and beyond on either side.
    patched = np.array([-1.0, 0.0, 1.0, 3.0, 5.0])
    assert recovered_fraction(patched, np.array(3.0), np.array(-1.0)).tolist() == [0.0, 0.25, 0.5, 1.0, 1.5]
    assert lost_fraction(patched, np.array(3.0), np.array(-1.0)).tolist() == [1.0, 0.75, 0.5, 0.0, -0.5]


def test_recovered_and_lost_add_up_to_one():
    assert math.isclose(recovered_fraction(0.3, 2.0, -1.0) + lost_fraction(0.3, 2.0, -1.0), 1.0)


def test_effect_fraction_follows_the_direction():
    assert effect_fraction(0.0, 3.0, -1.0, "denoising") == 0.25
    assert effect_fraction(0.0, 3.0, -1.0, "noising") == 0.75
