"""Projections that keep no input for the backward pass where it is cheap to make it again.

The input of a projection is a cheap step away from tensors that are kept anyway: a norm of the
hidden state, SwiGLU's product of gate and up. Autograd keeps both ends of the step; what is here
keeps the sources alone, and makes the input again for the gradient of the projection's weight. No
product of matrices is done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Derived(NamedTuple):
    """A tensor that the backward pass can recompute, as `make(*sources)`: only these are saved.

    Without sources it is saved itself.
    """

    value: Tensor
    make: Callable[..., Tensor] = lambda x: x
    sources: tuple[Tensor, ...] = ()


class _Around:
    """What is around the work that torch.compile traces: whether it lies in a checkpoint.

    All of it is computed again then, and there must be neither checkpoints nor Functions in it:
    torch.compile keeps what goes into a checkpoint inside another one, and what a Function takes
    and returns.
    """

    checkpoint = False


around = _Around()


def is_recomputed() -> bool:
    """Say whether what is compiled now lies in a checkpoint."""
    return torch.compiler.is_compiling() and around.checkpoint


class _Once:
    """A `make` for the backward pass that makes its value once, for all that need it.

    Those are the projections that share an input, and then the gradient of `make` itself.
    """

    def __init__(self, make: Callable[..., Tensor], needs: Sequence[bool]) -> None:
        self.make, self.needs = make, needs  # which sources need gradients
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def __call__(self, *sources: Tensor) -> Tensor:
        if self._made is None:
            with torch.enable_grad():
                leaves = [
                    source.detach().requires_grad_(need)
                    for source, need in zip(sources, self.needs, strict=True)
                ]
                self._made = self.make(*leaves), leaves
        return self._made[0].detach()

    def gradients(self, grad: Tensor, sources: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """Yield the gradients of the sources; the value is let go."""
        self(*sources)
        assert self._made
        (value, leaves), self._made = self._made, None
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(value, needed, grad))
        return (next(found) if need else None for need in self.needs)


class _Step(torch.autograd.Function):
    """make(*sources), keeping the sources alone."""

    @staticmethod
    def forward(ctx: Any, once: _Once, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        ctx.once = once
        return once.make(*sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.once.gradients(grad, ctx.saved_tensors)


def derive(make: Callable[..., Tensor], *sources: Tensor) -> Derived:
    """Return make(*sources); of the step itself, too, only the sources are kept.

    `make` draws no random numbers.
    """
    needed = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    if not needed or is_recomputed():
        return Derived(make(*sources))
    if torch.compiler.is_compiling():  # which sees through a Function and keeps what it likes
        value = checkpoint(make, *sources, use_reentrant=False, preserve_rng_state=False)
        return Derived(value, make, sources)
    # A Function is a fourth of the work of a checkpoint: small models feel it.
    once = _Once(make, [source.requires_grad for source in sources])
    return Derived(_Step.apply(once, *sources), once, sources)  # type: ignore[no-untyped-call]


def swiglu(gate: Tensor, up: Tensor) -> Derived:
    """Return silu(gate) * up."""
    return derive(_gated, gate, up)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def normed(norm: nn.RMSNorm, x: Tensor) -> Derived:
    """Return norm(x)."""
    eps = norm.eps

    def make(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    return derive(make, x, norm.weight)


def dropped(x: Derived, rate: float) -> Derived:
    """Return `x` after dropout; a mask is kept beside the sources of `x`."""
    value, mask = torch.native_dropout(x.value, rate, True)
    if is_recomputed():
        return Derived(value)
    whole = x.make  # `x` itself would keep its value

    def make(mask: Tensor, *sources: Tensor) -> Tensor:
        return torch.ops.aten.native_dropout_backward(whole(*sources), mask, 1 / (1 - rate))

    return Derived(value, make, (mask, *(x.sources or (x.value,))))


class _Product(torch.autograd.Function):
    """x W^T in x's dtype, keeping the sources of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, make: Callable[..., Tensor], *sources: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, *sources)
        ctx.make = make
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        needs_x, needs_weight, *others = ctx.needs_input_grad
        grad_x = grad @ weight.to(grad.dtype) if needs_x else None
        grad_weight = None
        if needs_weight:
            x = ctx.make(*sources).flatten(0, -2)
            grad_weight = (grad.flatten(0, -2).T @ x).to(weight.dtype)
        return grad_x, grad_weight, *(None for _ in others)  # x passes gradients to its sources


def product(x: Derived, weight: Tensor) -> Tensor:
    """Return x W^T in the dtype of x, which is not kept if it has sources."""
    if not (x.sources and torch.is_grad_enabled()):
        return F.linear(x.value, weight.to(x.value.dtype))
    y: Tensor = _Product.apply(x.value, weight, x.make, *x.sources)  # type: ignore[no-untyped-call]
    return y


def project(linear: nn.Module, x: Derived) -> Tensor:
    """Return linear(x); `x` is not kept if the linear is of a known kind, or frozen.

    A class of linears whose forward takes a `Derived` says so: `takes_derived = True`.
    """
    y: Tensor
    if not torch.is_grad_enabled():
        y = linear(x.value)
    elif getattr(type(linear), "takes_derived", False):
        y = linear(x)
    elif type(linear) is nn.Linear and linear.bias is None and linear.weight.requires_grad:
        y = product(x, linear.weight)
    else:
        y = linear(x.value)
    return y


def project_each(linears: Sequence[nn.Module], x: Derived) -> Iterable[Tensor]:
    """Return linear(x) of each linear; those that are joined for inference take one product."""
    joined: Callable[[Tensor], Iterable[Tensor]] | None = getattr(linears[0], "joined", None)
    return joined(x.value) if joined else [project(linear, x) for linear in linears]
