"""The GPU's kernels as far as a machine without one can tell: numbers in Triton's interpreter, compilation, and use."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from mi_pipe.saes import kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def said_by(script: str, **variables: str) -> str:
    command = [sys.executable, "-m", f"tests.saes.{script}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    return done.stdout or done.stderr[-2000:]


@needs_triton
def test_kernels_equal_dense_products_in_the_interpreter():
    assert said_by("triton_interpreted", TRITON_INTERPRET="1") == "equal\n"


@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path):
    assert said_by("triton_compiled", TRITON_CACHE_DIR=str(tmp_path)) == "compiled\n"


def test_they_are_used_on_gpus_in_single_precision_alone(monkeypatch):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(kernels, "_triton_kernels", lambda: "kernels")
    assert kernels.gpu_kernels(torch.zeros(2)) is None
    assert kernels.gpu_kernels(torch.zeros(2).as_subclass(OnGpu)) == "kernels"
    assert kernels.gpu_kernels(torch.zeros(2, dtype=torch.float64).as_subclass(OnGpu)) is None
