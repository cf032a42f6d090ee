"""Ranks as values: alone, a run is rank 0 of 1 and every collective is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from mytune.errors import ConfigError, RanksLost

# On a GPU the CPU's backend serves what is offloaded there.
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
_GLOOS_WORDS = ("gloo", "Application timeout")  # it raises plain RuntimeErrors
Number = TypeVar("Number", float, Tensor)
Object = TypeVar("Object")


def rank() -> int:
    """Return this process's number among all."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restarts() -> int:
    """Return how often torchrun has started the ranks anew (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextmanager
def process_group(device: torch.device, timeout_seconds: float = 600.0) -> Iterator[None]:
    """Join the other ranks for as long as the block lasts.

    Args:
        timeout_seconds: how long a rank waits for the others before the run ends.

    Raises:
        ConfigError: no time at all.
        RanksLost: others died or did not answer in time.
    """
    if not timeout_seconds > 0:
        raise ConfigError(f"distributed_timeout is {timeout_seconds}; it must be above 0 seconds")
    if world_size() == 1:
        yield
        return
    timeout = timedelta(seconds=timeout_seconds)
    store, *_ = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps its store over restarts: without a name of its own, an attempt would read the
    # addresses of ranks that are gone.
    own = dist.PrefixStore(f"attempt_{restarts()}", store)  # type: ignore[attr-defined]
    dist.init_process_group(
        _BACKENDS[device.type], store=own, rank=rank(), world_size=world_size(), timeout=timeout
    )
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(w in str(error) for w in _GLOOS_WORDS)):
            raise
        raise RanksLost(
            f"rank {rank()} lost the other ranks: one died, or did not answer for "
            f"{timeout_seconds:g} s; a step that takes longer needs a larger distributed_timeout"
        ) from error
    # Not after an error: the other ranks are gone, and leaving in order would wait for them.
    dist.destroy_process_group()


def all_sum(value: Number) -> Number:
    """Return the sum of a number or a tensor over all ranks; a number's waits for no device."""
    if world_size() == 1:
        return value
    total = value.clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total if isinstance(value, Tensor) else total.item()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient of a parameter that is not sharded by its sum over all ranks."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    for bucket in _take_tensors(grads, 2**28):  # few and large messages, of one dtype each
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))


def from_rank_0(value: Object) -> Object:
    """Return what rank 0 gave."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def barrier_without_timeout() -> None:
    """Wait until every rank is here, for as long as one writes; a dead one ends the run anyway."""
    if world_size() > 1:
        dist.barrier(_patient_group())


@cache
def _patient_group() -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return group


def gather_objects(value: Object) -> list[Object]:
    """Return every rank's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
