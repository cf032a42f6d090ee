"""Seeds and determinism: what is random is a pure function of the seed and the step."""

from __future__ import annotations

import logging
import os
import random

import numpy as np
import torch

from mytune.errors import ConfigError
from mytune.training.distributed import from_rank_0

log = logging.getLogger("mytune")


def set_seed(seed: int | None = None) -> int:
    """Seed Python, numpy and torch, log and return the seed; None draws one for all ranks."""
    if seed is None:
        seed = from_rank_0(random.SystemRandom().randrange(2**31))
        log.info("seed: %d (drawn; seed=%d repeats this run)", seed, seed)
    elif not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}; it must be at least 0 and below 2**63")
    else:
        log.info("seed: %d", seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed


def seed_step(seed: int, step: int, rank: int = 0, device: torch.device | None = None) -> None:
    """Seed the CPU's and the device's generators for one step of one rank.

    Dropout then depends on these numbers alone: a resumed run needs no saved generator state.
    """
    mixed = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    value = int(mixed[0])
    # Not torch.manual_seed: it seeds every device of the machine and takes 100 times as long.
    torch.default_generator.manual_seed(value)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(value)


def set_deterministic(mode: str | int | None) -> None:
    """Choose deterministic kernels: "default" (0) no, "warn" (1) where there are, "error" (2) only.

    With "warn" the backward pass of attention on CUDA stays as it is: torch makes it deterministic
    for "error" alone.

    Call it before anything is on the device: cuBLAS reads its workspace setting when CUDA starts.
    """
    if mode not in (None, "default", "warn", "error", 0, 1, 2):
        raise ConfigError(
            f"cudnn_deterministic_mode is {mode!r}; it can be default (0), warn (1) or error (2)"
        )
    torch.set_deterministic_debug_mode(mode or 0)
    torch.backends.cudnn.deterministic = torch.are_deterministic_algorithms_enabled()
    if torch.backends.cudnn.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
