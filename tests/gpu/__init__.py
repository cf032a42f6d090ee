"""What needs CUDA: correctness (pytest) and measurements; `python -m tests.gpu` runs both.

Nothing is downloaded: weights are random and made on the device. With MYTUNE_GPU_SUITE_ON=cpu all
of it runs on the CPU in tiny sizes, which tests the suite itself.
"""

from __future__ import annotations

import os

import torch

TINY = os.environ.get("MYTUNE_GPU_SUITE_ON") == "cpu"
DEVICE = torch.device("cpu" if TINY else "cuda")
HERE = TINY or torch.cuda.is_available()
NO_CUDA = (
    f"needs CUDA, which torch {torch.__version__} does not find here "
    "(MYTUNE_GPU_SUITE_ON=cpu tries the suite itself, in tiny sizes)"
)
