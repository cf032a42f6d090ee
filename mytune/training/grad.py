"""Gradients before the step: their norm, clipping, and the check that all numbers are finite."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from mytune._sharded import local, sharded_as, whole
from mytune.errors import ConfigError, NumericalError

_PIECE = 2**13  # numbers whose squares are summed in one go on a CPU


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients down to `max_norm` and return the norm that they had: a float32 scalar.

    None and inf clip nothing; the norm is computed all the same. Gradients are summed in float32,
    on a CPU in pieces: torch's own norm of a large tensor is 1e-4 too small there. Sharded ones
    count whole, so all ranks return the same. Does not wait for the device.
    """
    if max_norm is not None and not max_norm > 0:
        raise ConfigError(f"clip_grad_norm is {max_norm}; it must be above 0, or null for none")
    meshes = _by_mesh(p for p in parameters if p.grad is not None)
    norm = total_norm([grad_norm(group) for group in meshes])
    if max_norm is not None and math.isfinite(max_norm):
        for group in meshes:
            clip_grads_with_norm_(group, max_norm, norm)
    return norm


def grad_norm(parameters: list[Tensor]) -> Tensor:
    """Return the norm of gradients that are all whole, or all sharded alike: float32 [1].

    Of sharded ones the norm of each rank's part, [ranks], sharded as they are.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    pieces = [piece for grad in grads for piece in _pieces(local(grad))]
    norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))[None]
    first = grads[0]
    if not isinstance(first, DTensor):
        return norm
    return DTensor.from_local(norm, first.device_mesh, first.placements, run_check=False)


def _pieces(grad: Tensor) -> Sequence[Tensor]:
    return grad.flatten().split(_PIECE) if grad.device.type == "cpu" else (grad,)


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm of everything whose `grad_norm`s these are, on every rank; 0 of nothing."""
    parts = [torch.zeros(1)] if not norms else []
    for group in _by_mesh(norms):
        part = torch.linalg.vector_norm(torch.cat([local(norm) for norm in group]))[None]
        parts.append(whole(sharded_as(group[0], part)))
    total: Tensor = torch.linalg.vector_norm(torch.cat(parts))
    return total


def _by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by what they are sharded over: torch cannot mix these in one operation."""
    meshes: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        meshes.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(meshes.values())


def check_finite(
    loss: Tensor, grad_norm: Tensor, *, step: int, rows: Sequence[int] = ()
) -> tuple[float, float]:
    """Return loss and gradient norm as numbers; call it before the optimizer's step.

    Waits for the device once. `rows` are the samples that the step has seen.

    Raises:
        NumericalError: one of the two is NaN or infinite.
    """
    values = torch.stack([loss.detach().float(), grad_norm.float()]).tolist()
    if not all(map(math.isfinite, values)):
        seen = f" (rows {reprlib.repr(list(rows))} of the data)" if rows else ""
        raise NumericalError(
            f"step {step}: loss is {values[0]}, grad_norm is {values[1]}{seen}; nothing of "
            "this step was kept, the last checkpoint stays; lower optimizer.lr, set "
            "clip_grad_norm=1.0, or look at these rows"
        )
    return values[0], values[1]
