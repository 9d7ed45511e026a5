"""Measures what a harvest's compute and storage precision cost, on a few prompts, before it begins."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped

from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.harvest.precision import Precision, PrecisionError, precision_error
from mi_pipe.activations.harvest.writer import StorageOverflowError
from mi_pipe.activations.storage_dtype import StoreDType, decode
from mi_pipe.models.model import Model

Rows = dict[str, Shaped[np.ndarray, "row width"]]


def measure_precision(
    plan: HarvestPlan,
    model: Model,
    precision: Precision,
    store_dtype: StoreDType,
    massive_factor: float,
    n_prompts: int,
    round_weights: Callable[[], None],
) -> dict[str, PrecisionError]:
    """Return each hook point's error against float32 on prompts spread over the set.

    `model` comes with float32 weights and leaves with those `round_weights` has made of them. Raises
    StorageOverflowError if a value of the sample does not fit the storage dtype.
    """
    names = [array.name for array in plan.layout.arrays]
    batches = list(plan.sample(n_prompts))
    exact = ForwardPass(model, names, "float32", "float32")
    references = [exact.exact(tokens, kept) for tokens, kept in batches]
    round_weights()
    forward = ForwardPass(model, names, precision, store_dtype)
    stored = [forward.stored(tokens, kept) for tokens, kept in batches]
    return {name: _error(name, references, stored, store_dtype, massive_factor) for name in names}


def _error(
    name: str, references: list[Rows], stored: list[Rows], store_dtype: StoreDType, massive_factor: float
) -> PrecisionError:
    reference = np.concatenate([rows[name] for rows in references])
    values = decode(np.concatenate([rows[name] for rows in stored]), store_dtype)
    if not np.isfinite(values).all():
        largest = float(np.abs(reference).max())
        raise StorageOverflowError(
            f"Values at {name} do not fit {store_dtype}: in float32 the largest of a small sample is {largest:,.0f}. "
            "Set store_dtype: bfloat16, or on_overflow: bfloat16."
        )
    return precision_error(reference, values, massive_factor)
