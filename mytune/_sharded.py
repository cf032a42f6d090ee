"""Tensors that are shared out over ranks by their rows (FSDP2), and the part that this rank holds.

A tensor that is not shared out is its own only part, so callers need not ask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Part:
    """Which part of a tensor's rows a rank holds, and whether another rank holds the same."""

    index: int
    count: int
    is_copy: bool = False

    def rows(self, length: int) -> slice:
        """Return the rows, of `length` in all: parts are equal but for the last ones."""
        each = -(-length // self.count)
        return slice(min(self.index * each, length), min((self.index + 1) * each, length))


WHOLE = Part(0, 1)


def part_of(tensor: Tensor) -> Part:
    """Return which part of `tensor` this rank holds."""
    if not isinstance(tensor, DTensor):
        return WHOLE
    mesh = tensor.device_mesh
    index, count, is_copy = 0, 1, False
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            index, count = mesh.get_local_rank(dim), mesh.size(dim)
        else:
            is_copy |= mesh.get_local_rank(dim) > 0
    return Part(index, count, is_copy)


def own_rows(like: Tensor) -> slice:
    """Return the rows of `like` that this rank holds; all of a tensor that is not sharded."""
    return part_of(like).rows(like.shape[0]) if isinstance(like, DTensor) else slice(None)


def sharded_as(like: Tensor, local: Tensor) -> Tensor:
    """Return the tensor that is sharded as `like` and of which this rank holds `local`."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as every rank together has it; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy this rank's rows of `values`, which are whole, into `tensor`."""
    local(tensor).copy_(values[own_rows(tensor)])
