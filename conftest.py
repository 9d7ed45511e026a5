"""What pytest leaves alone where an optional dependency is missing (doctests import every module)."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["mi_pipe/saes/triton_kernels.py"]
