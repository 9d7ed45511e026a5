"""What the forward pass computes in, and what that costs against float32.

mixed     products in bfloat16, residual stream in float32: torch's autocast. Weights of linear maps are rounded to
          bfloat16 once beforehand, which gives autocast's own numbers without its rounding them again each call.
bfloat16  weights and residual stream in bfloat16.
float32   everything in float32.
auto      mixed where the device has bfloat16 products (recent CUDA, CPUs with AMX or AVX512-BF16); elsewhere float32,
          which is more exact and there faster too (a 576 to 1536 product on a CPU without: 8 times).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from mi_pipe.models.device import multiplies_bfloat16

Precision = Literal["mixed", "bfloat16", "float32"]
PrecisionChoice = Literal["auto", "mixed", "bfloat16", "float32"]


def pick_precision(choice: PrecisionChoice, device: torch.device) -> Precision:
    """Return the precision that a choice means on a device."""
    if choice != "auto":
        return choice
    return "mixed" if multiplies_bfloat16(device) else "float32"


def round_weights(module: nn.Module, precision: Precision) -> None:
    """Round a float32 model's weights in place to what `precision` computes with; buffers stay as they are."""
    if precision == "bfloat16":
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    elif precision == "mixed":
        embedded = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
        for child in module.modules():
            if _is_linear(child) and id(child.weight) not in embedded:
                for parameter in child.parameters(recurse=False):
                    parameter.data = parameter.data.to(torch.bfloat16)


def _is_linear(module: nn.Module) -> bool:
    """Say whether a module is one product: torch's Linear, or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the model is to be run."""
    if precision == "mixed":
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return nullcontext()


@dataclass(frozen=True)
class PrecisionError:
    """The error of stored rows against the float32 forward pass, massive rows left out."""

    relative_error: float
    """Root of the sum of squared errors over the sum of squares."""
    fvu_added: float
    """Sum of squared errors over the sum of squares centred on the mean row."""
    n_rows: int
    n_massive: int


def precision_error(
    reference: Float[np.ndarray, "row width"], stored: Float[np.ndarray, "row width"], massive_factor: float
) -> PrecisionError:
    """Compare rows with their float32 values; rows above `massive_factor` median norms are left out."""
    norms = np.linalg.norm(reference.astype(np.float64), axis=1)
    counted = norms <= massive_factor * np.median(norms)
    exact = reference[counted].astype(np.float64)
    error = float(np.square(stored[counted] - exact).sum())
    total = float(np.square(exact).sum())
    centred = float(np.square(exact - exact.mean(0)).sum())
    return PrecisionError(
        relative_error=float(np.sqrt(error / total)) if total else 0.0,
        fvu_added=error / centred if centred else 0.0,
        n_rows=int(counted.sum()),
        n_massive=int((~counted).sum()),
    )
