"""Whether Triton is there: its kernels are for CUDA, and each has a plain way beside it."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
