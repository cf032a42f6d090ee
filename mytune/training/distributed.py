"""Ranks as values: alone, a run is rank 0 of 1 and every collective is the identity."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def rank() -> int:
    """Return this process's number among all."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def all_sum(value: float, device: torch.device) -> float:
    """Return the sum of a number over all ranks."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)
