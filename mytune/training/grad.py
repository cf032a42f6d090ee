"""Gradients before the step: their norm, clipping, and the check that all numbers are finite."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.utils import clip_grads_with_norm_

from mytune._sharded import local
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
    meshes: dict[object, list[Tensor]] = {}
    for parameter in parameters:  # torch cannot mix sharded and whole tensors in one operation
        if parameter.grad is not None:
            meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [_grad_norm([p.grad for p in group]) for group in meshes.values()]
    norms = norms or [torch.zeros(())]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None and math.isfinite(max_norm):
        for group in meshes.values():
            clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _grad_norm(grads: Sequence[Tensor | None]) -> Tensor:
    """Return the norm of gradients that are all whole, or all sharded alike."""
    pieces = [piece for grad in grads if grad is not None for piece in _pieces(local(grad))]
    norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    sharded = next((grad for grad in grads if isinstance(grad, DTensor)), None)
    if sharded is None:
        return norm
    terms = [Partial() if each.is_shard() else Replicate() for each in sharded.placements]
    squares = DTensor.from_local(norm.square(), sharded.device_mesh, terms, run_check=False)
    return squares.full_tensor().sqrt()


def _pieces(grad: Tensor) -> Sequence[Tensor]:
    return grad.flatten().split(_PIECE) if grad.device.type == "cpu" else (grad,)


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
            f"step {step}: loss is {values[0]}, grad_norm is {values[1]}{seen}; the step was not "
            "taken, the last checkpoint stays; lower optimizer.lr, set clip_grad_norm=1.0, or look "
            "at these rows"
        )
    return values[0], values[1]
