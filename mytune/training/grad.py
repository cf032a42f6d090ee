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
    meshes: dict[object, list[Tensor]] = {}
    for parameter in parameters:  # torch cannot mix sharded and whole tensors in one operation
        if parameter.grad is not None:
            meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [_grad_norm(group) for group in meshes.values()] or [torch.zeros(())]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None and math.isfinite(max_norm):
        for group in meshes.values():
            clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _grad_norm(parameters: list[Tensor]) -> Tensor:
    """Return the norm of all gradients, whole on every rank."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
    total = torch.linalg.vector_norm(torch.stack(norms))
    return total.full_tensor() if isinstance(total, DTensor) else total


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
