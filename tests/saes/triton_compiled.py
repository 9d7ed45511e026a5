"""Compiles the Triton kernels for an H100 or H200 (sm_90), which takes no GPU: a script."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mi_pipe.saes import triton_kernels

TARGET = GPUTarget("cuda", 90, 32)
TABLES = ("fp32", "bf16")


def main() -> None:
    """Compile each for float32 and bfloat16."""
    for dtype in TABLES:
        pointers = dict.fromkeys(("weights", "table", "out", "rows", "features"), f"*{dtype}")
        places = dict.fromkeys(("starts", "places", "entry_rows", "entry_features"), "*i32")
        numbers = dict.fromkeys(("width", "n_entries"), "i32")
        blocks = {"n_step": 8, "n_here": 32, "n_columns": 256}
        known = {**pointers, **places, **numbers, **dict.fromkeys(blocks, "constexpr")}
        for kernel in (triton_kernels._weighted_sums, triton_kernels._entry_products):
            signature = {name: known[name] for name in kernel.arg_names}
            constants = {name: value for name, value in blocks.items() if name in signature}
            compiled = triton.compile(ASTSource(kernel, signature, constants), target=TARGET)
            assert ".target sm_90" in compiled.asm["ptx"]
    sys.stdout.write("compiled\n")


if __name__ == "__main__":
    main()
