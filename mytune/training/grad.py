"""Gradients before the step: their norm, clipping, and the check that all numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

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
    with_grad = [p for p in parameters if p.grad is not None]
    norm = _total_norm([p.grad for p in with_grad if p.grad is not None])
    if max_norm is not None and math.isfinite(max_norm):
        clip_grads_with_norm_(with_grad, max_norm, norm)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    meshes: dict[object, list[Tensor]] = {}
    for grad in grads:  # sharded and plain tensors cannot be stacked together
        meshes.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = [_norm(torch._foreach_norm(group, 2, dtype=torch.float32)) for group in meshes.values()]
    return norms[0] if len(norms) == 1 else _norm(norms)


def _norm(norms: Iterable[Tensor]) -> Tensor:
    """Return the norm of norms, whole on every rank."""
    total = torch.linalg.vector_norm(torch.stack(list(norms)))
    return total.full_tensor() if isinstance(total, DTensor) else total


def check_finite(
    loss: Tensor, grad_norm: Tensor, *, step: int, samples: str = ""
) -> tuple[float, float]:
    """Return loss and gradient norm as numbers; call it before the optimizer's step.

    Waits for the device once. `samples` says in words which rows the step has seen.

    Raises:
        NumericalError: one of the two is NaN or infinite.
    """
    values = torch.stack([loss.detach().float(), grad_norm.float()]).tolist()
    if not all(map(math.isfinite, values)):
        raise NumericalError(
            f"step {step}: loss is {values[0]}, grad_norm is {values[1]}"
            f"{f' (samples: {samples})' if samples else ''}; the step was not taken, the last "
            "checkpoint stays; lower optimizer.lr, set clip_grad_norm=1.0, or look at these samples"
        )
    return values[0], values[1]
