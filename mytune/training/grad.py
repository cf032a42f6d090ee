"""Gradients before the step: their norm, clipping, and the check that all numbers are finite."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from mytune.errors import ConfigError, NumericalError


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients down to `max_norm` and return the norm that they had: a float32 scalar.

    None and inf clip nothing; the norm is computed all the same. For float32 gradients this is
    `torch.nn.utils.clip_grad_norm_` bit for bit; others are summed in float32. Sharded gradients
    count whole, so all ranks return the same. Does not wait for the device.
    """
    if max_norm is not None and not max_norm > 0:
        raise ConfigError(f"clip_grad_norm is {max_norm}; it must be above 0, or null for none")
    meshes = _by_mesh(p for p in parameters if p.grad is not None)
    norm = total_norm([each for group in meshes for each in grad_norms(group)])
    if max_norm is not None and math.isfinite(max_norm):
        for group in meshes:
            clip_grads_with_norm_(group, max_norm, norm)
    return norm


def grad_norms(parameters: list[Tensor]) -> list[Tensor]:
    """Return the float32 norm of each gradient; of a sharded one a sharded norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return list(torch._foreach_norm(grads, 2, dtype=torch.float32))


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm of everything whose norms these are, whole on every rank; 0 of nothing."""
    parts: list[Tensor] = []
    for group in _by_mesh(norms):
        part = torch.linalg.vector_norm(torch.stack(group))
        parts.append(part.full_tensor() if isinstance(part, DTensor) else part)
    if len(parts) == 1:
        return parts[0]
    total: Tensor = torch.linalg.vector_norm(torch.stack(parts or [torch.zeros(())]))
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
