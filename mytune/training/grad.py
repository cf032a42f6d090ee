"""Gradients before the step: their norm, clipping, and the check that all numbers are finite."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from mytune._sharded import local, whole
from mytune.errors import ConfigError, NumericalError
from mytune.training.distributed import gather_objects

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
    meshes = by_mesh(p for p in parameters if p.grad is not None)
    norm = total_norm([(group[0], piece_norms(group)) for group in meshes])
    if max_norm is not None and math.isfinite(max_norm):
        for group in meshes:
            clip_grads_with_norm_(group, max_norm, norm)
    return norm


def piece_norms(parameters: list[Tensor]) -> Tensor:
    """Return the float32 norms of the pieces of this rank's gradients: [pieces]."""
    grads = [p.grad for p in parameters if p.grad is not None]
    pieces = [piece for grad in grads for piece in _pieces(local(grad))]
    return torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32))


def _pieces(grad: Tensor) -> Sequence[Tensor]:
    return grad.flatten().split(_PIECE) if grad.device.type == "cpu" else (grad,)


def total_norm(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the norm, on every rank, of all gradients; 0 of nothing.

    `parts` are a parameter and the `piece_norms` of all that are sharded as it is.
    """
    norms = [torch.zeros(1)] if not parts else []
    for like, pieces in parts:
        norm = torch.linalg.vector_norm(pieces)[None]
        if isinstance(like, DTensor):  # [ranks], sharded as the gradients are
            norm = DTensor.from_local(norm, like.device_mesh, like.placements, run_check=False)
        norms.append(whole(norm))
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms))
    return total


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by what they are sharded over: torch cannot mix these in one operation."""
    meshes: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        meshes.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(meshes.values())


def check_finite(
    loss: Tensor, grad_norm: Tensor, *, step: int, rows: Sequence[int] = ()
) -> tuple[float, float]:
    """Return loss and gradient norm as numbers; call it before the optimizer's step.

    Waits for the device once. Both are of all ranks, and so is the error: `rows` are the samples
    that this rank has seen in the step.

    Raises:
        NumericalError: one of the two is NaN or infinite.
    """
    values = torch.stack([loss.detach().float(), grad_norm.float()]).tolist()
    if not all(map(math.isfinite, values)):
        of_all = sorted(chain.from_iterable(gather_objects(list(rows))))
        seen = f" (rows {reprlib.repr(of_all)} of the data)" if of_all else ""
        raise NumericalError(
            f"step {step}: loss is {values[0]}, grad_norm is {values[1]}{seen}; nothing of "
            "this step was kept, the last checkpoint stays; lower optimizer.lr, set "
            "clip_grad_norm=1.0, or look at these rows"
        )
    return values[0], values[1]
