"""Projections that keep no input for the backward pass where it is cheap to make it again.

The input of a projection is often a cheap step away from tensors that are kept anyway, as SwiGLU's
product is from gate and up. Autograd keeps both; what is here keeps the latter alone, and the
gradient of the projection's weight makes the input again: no product of matrices is done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Derived(NamedTuple):
    """A tensor, and how to make it again: `make(*sources)`. Without sources it is kept itself."""

    value: Tensor
    make: Callable[..., Tensor] = lambda x: x
    sources: tuple[Tensor, ...] = ()


class _Product(torch.autograd.Function):
    """x W^T in x's dtype, keeping the sources of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, make: Callable[..., Tensor], *sources: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, *(sources or (x,)))
        ctx.make = make
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = grad @ weight.to(grad.dtype) if needs_x else None
        grad_weight = None
        if needs_weight:
            x = ctx.make(*sources).flatten(0, -2)
            grad_weight = (grad.flatten(0, -2).T @ x).to(weight.dtype)
        return grad_x, grad_weight, *(None for _ in ctx.needs_input_grad[2:])


def product(x: Derived, weight: Tensor) -> Tensor:
    """Return x W^T in x's dtype; the backward pass gets the sources of `x` to keep, and not `x`."""
    if not torch.is_grad_enabled():
        return F.linear(x.value, weight.to(x.value.dtype))
    y: Tensor = _Product.apply(x.value, weight, x.make, *x.sources)  # type: ignore[no-untyped-call]
    return y


def project(linear: nn.Module, x: Derived) -> Tensor:
    """Return linear(x), which keeps no `x` if the linear trains and is of a known kind.

    A class of linears whose forward takes a `Derived` says so: `takes_derived = True`. A frozen
    linear keeps no input anyway.
    """
    if getattr(type(linear), "takes_derived", False):
        y: Tensor = linear(x)
        return y
    if type(linear) is nn.Linear and linear.bias is None and linear.weight.requires_grad:
        return product(x, linear.weight)
    y = linear(x.value)
    return y


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping gate and up: autograd would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Derived:
    """Return silu(gate) * up, which can be made again from `gate` and `up`."""
    made = _SwiGLU.apply if torch.is_grad_enabled() else _gated
    return Derived(made(gate, up), _gated, (gate, up))


def dropped(x: Derived, rate: float) -> Derived:
    """Return `x` after dropout, which can be made again from the sources of `x` and a mask."""
    value, mask = torch.native_dropout(x.value, rate, True)

    def make(mask: Tensor, *sources: Tensor) -> Tensor:
        return torch.ops.aten.native_dropout_backward(x.make(*sources), mask, 1 / (1 - rate))

    return Derived(value, make, (mask, *(x.sources or (x.value,))))
