"""Whether Triton can be used: its kernels are for CUDA, and each has a plain way beside it."""

import os
import shutil
from importlib.util import find_spec

# It compiles a launcher for each kernel, with the compiler that CC is or else one of these.
_COMPILERS = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]

HAS_TRITON = find_spec("triton") is not None and any(map(shutil.which, _COMPILERS))
