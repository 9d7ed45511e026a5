"""What pytest leaves alone where an optional dependency is missing (doctests import every module)."""

import importlib.util

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore += [
        "mi_pipe/saes/triton_kernels.py",
        "tests/saes/triton_compiled.py",
        "tests/saes/triton_interpreted.py",
    ]
