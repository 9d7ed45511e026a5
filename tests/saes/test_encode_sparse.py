import pytest
import torch

from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE

RULES = {
    "topk": InferenceRule("topk", k=5),
    "one threshold": InferenceRule("threshold", threshold=torch.tensor(0.7)),
    "a threshold a feature": InferenceRule("threshold", threshold=torch.linspace(0, 2, 512)),
    "a threshold below zero": InferenceRule("threshold", threshold=torch.tensor(-1.0)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("n_rows", [1, 33])
def test_the_sparse_code_is_that_of_encode(rule, n_rows):
    torch.manual_seed(0)
    sae = SAE(torch.randn(16, 512), torch.randn(512), torch.randn(512, 16), torch.randn(16), rule)
    x = torch.randn(n_rows, 16)
    code = sae.encode_sparse(x)
    torch.testing.assert_close(code.dense(), sae.encode(x))
    assert code.row_starts[-1] == len(code.features) == len(code.values)


def test_rows_where_nothing_fires_have_an_empty_code():
    sae = SAE(torch.ones(2, 3), torch.full((3,), -9.0), torch.ones(3, 2), torch.zeros(2), RULES["one threshold"])
    assert sae.encode_sparse(torch.tensor([[1.0, 1.0], [9.0, 9.0]])).row_starts.tolist() == [0, 0, 3]
