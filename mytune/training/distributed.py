"""Ranks as values: alone, a run is rank 0 of 1 and every collective is the identity.

Every rank holds the whole model; gradients are summed over ranks once per optimizer step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
Number = TypeVar("Number", float, Tensor)
Object = TypeVar("Object")


def rank() -> int:
    """Return this process's number among all."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device, timeout_seconds: float = 600.0) -> Iterator[None]:
    """Join the other ranks for as long as the block lasts."""
    if world_size() == 1:
        yield
        return
    dist.init_process_group(_BACKENDS[device.type], timeout=timedelta(seconds=timeout_seconds))
    yield  # after an error the other ranks are gone, and leaving in order would wait for them
    dist.destroy_process_group()


def all_sum(value: Number, device: torch.device) -> Number:
    """Return the sum of a number or a tensor over all ranks."""
    if world_size() == 1:
        return value
    if isinstance(value, Tensor):
        total = value.clone()
        dist.all_reduce(total)
        return total
    return float(all_sum(torch.tensor(value, dtype=torch.float64, device=device), device))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over all ranks."""
    if world_size() == 1:
        return
    sums = [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
    for each in sums:
        each.wait()


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: Object) -> list[Object]:
    """Return every rank's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
