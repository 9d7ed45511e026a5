"""How numbers lie on disk: float16, float32, or the bits of bfloat16 as uint16 (Zarr v3 has no bfloat16 in Python).

Fill values are NaN throughout, so that what was never written cannot pass for data.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

StoreDType = Literal["float16", "float32", "bfloat16"]

_NUMPY = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
_TORCH = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
_BFLOAT16_NAN_BITS = 0x7FC0
_BFLOAT16_SHIFT = 16
_PIECE = 1 << 15


def numpy_dtype(store_dtype: StoreDType) -> np.dtype:
    """Return the dtype of the array on disk."""
    return _NUMPY[store_dtype]


def torch_store_dtype(store_dtype: StoreDType) -> torch.dtype:
    """Return the dtype that a tensor is rounded to before it is stored."""
    return _TORCH[store_dtype]


def fill_value(store_dtype: StoreDType) -> float | int:
    """Return what stands for "not written": NaN, for bfloat16 as bits."""
    return _BFLOAT16_NAN_BITS if store_dtype == "bfloat16" else float("nan")


def as_stored(values: Float[Tensor, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """View a CPU tensor of a storage dtype as the array that is written, without copying."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view("<u2")
    return values.numpy()


def decode(
    stored: Shaped[np.ndarray, "*shape"], store_dtype: StoreDType, out: Float[np.ndarray, "*shape"] | None = None
) -> Float[np.ndarray, "*shape"]:
    """Return stored values as float32, in `out` if given; exact for all three dtypes."""
    if out is None:
        out = np.empty(stored.shape, np.float32)
    if store_dtype == "bfloat16":
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, _BFLOAT16_SHIFT, out=bits)
    elif store_dtype == "float16" and stored.flags.c_contiguous and stored.flags.writeable and out.flags.c_contiguous:
        _widen(torch.from_numpy(stored.reshape(-1)), torch.from_numpy(out.reshape(-1)))
    else:
        np.copyto(out, stored)
    return out


def _widen(stored: Float[Tensor, " n"], out: Float[Tensor, " n"]) -> None:
    """Copy float16 to float32 with torch (10 times NumPy's speed), in pieces small enough to stay in this thread."""
    for start in range(0, len(stored), _PIECE):
        out[start : start + _PIECE].copy_(stored[start : start + _PIECE])
