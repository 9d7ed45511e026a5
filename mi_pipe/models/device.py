"""Which device and dtype to compute with."""

from typing import Literal

import torch

from mi_pipe.core.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]


def pick_device(name: str = "auto") -> torch.device:
    """Return the named device, or for "auto" the best one found: cuda, then mps, then cpu.

    Raises ConfigError if a named device is not there.
    """
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if found[kind]))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not a device: use auto, cuda, cuda:1, mps or cpu.") from error
    if not found.get(device.type, False):
        here = ", ".join(kind for kind, there in found.items() if there)
        raise ConfigError(f"device {name!r} is not available on this machine: found {here}. Use device=auto.")
    return device


def torch_dtype(name: DType) -> torch.dtype:
    """Return the torch dtype of a config value."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether a device has instructions for bfloat16 products; without them float32 is several times faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
