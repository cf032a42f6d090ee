"""Linears for decoding on a GPU: with one row they take the time of reading their weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mytune._triton import HAS_TRITON
from mytune.quantization.tensors import numbers_and_scale

KINDS = ("Int8Tensor", "Float8Tensor")
Layout = tuple[Callable[..., nn.Module], tuple[Tensor, ...]]  # a linear, what it is made of by rows


class RowLinear(nn.Module):
    """A linear without bias, for inference on a GPU.

    Args:
        weight: [out, in], of 16 or 32 bits, or of 8 bits with a scale.
        scale: what each row of 8-bit numbers is multiplied with, [out].
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            from mytune.generation.row_triton import row_product

            product: Tensor = row_product(x, self.weight, self.scale)
            return product
        y = F.linear(x, self.weight.to(x.dtype))
        return y if self.scale is None else (y * self.scale).to(x.dtype)


def row_layout(weight: Tensor) -> Layout | None:
    """Return the linear that is made for a weight on a GPU and its tensors by rows, or None."""
    if not HAS_TRITON:
        return None
    from mytune.generation.row_triton import fits

    if type(weight) is nn.Parameter:
        return (RowLinear, (weight.detach(),)) if fits(weight) else None
    parts = numbers_and_scale(weight, KINDS)
    return (RowLinear, parts) if parts and fits(parts[0]) else None
