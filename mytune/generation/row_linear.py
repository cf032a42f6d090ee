"""Linears for decoding on a GPU: with one row they take the time of reading their weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mytune._triton import HAS_TRITON
from mytune.quantization.tensors import inner_tensors


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


class NibbleLinear(nn.Module):
    """A linear without bias and with a 4-bit weight, for inference on a GPU.

    Args:
        codes: two numbers to a byte, as `pack_nibbles` makes them: [out, in / 2].
        scales: of groups of numbers, [out, groups].
        zeros: alike; a number n stands for (n - 8) * scale + zero.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        super().__init__()
        self.codes, self.scales, self.zeros = (
            nn.Parameter(each, requires_grad=False) for each in (codes, scales, zeros)
        )

    def forward(self, x: Tensor) -> Tensor:
        from mytune.generation.row_triton import row_product_of_nibbles, unpack_nibbles

        if x.numel() == x.shape[-1]:
            product: Tensor = row_product_of_nibbles(x, self.codes, self.scales, self.zeros)
            return product
        return F.linear(x, unpack_nibbles(self.codes, self.scales, self.zeros).to(x.dtype))


def row_layout(weight: Tensor) -> tuple[Callable[..., nn.Module], tuple[Tensor, ...]] | None:
    """Return the linear that is made for a weight on a GPU and its tensors by rows, or None."""
    if not HAS_TRITON:
        return None
    from mytune.generation.row_triton import fits

    if type(weight) is nn.Parameter:
        return (RowLinear, (weight.detach(),)) if fits(weight) else None
    inner = inner_tensors(weight) if hasattr(type(weight), "tensor_data_names") else {}
    if inner.keys() == {"qdata", "scale_and_zero"}:
        return _nibbles(weight, **inner)
    zeros = inner.pop("zero_point", None)
    rounds = getattr(weight, "act_quant_kwargs", None) is not None  # activations, too
    if inner.keys() != {"qdata", "scale"} or rounds or (zeros is not None and zeros.any()):
        return None
    numbers, scale = inner["qdata"], inner["scale"].flatten()
    fitting = numbers.ndim == 2 and len(scale) == len(numbers) and fits(numbers)
    return (RowLinear, (numbers, scale)) if fitting else None


@torch.no_grad()
def _nibbles(
    weight: Tensor, qdata: Tensor, scale_and_zero: Tensor
) -> tuple[Callable[..., nn.Module], tuple[Tensor, ...]] | None:
    """Return a linear of torchao's tiles of 4-bit numbers, which only their product tells."""
    from mytune.generation.row_triton import pack_nibbles

    rows, width = weight.shape
    groups = len(scale_and_zero)
    group = width // groups
    if rows % 8 or width % 1024 or width % groups or (width // 2) % group or group & (group - 1):
        return None
    plain = torch.zeros_like(scale_and_zero)
    plain[..., 0] = 1  # a scale of 1 and no zero leave the numbers themselves
    numbers = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    for start in range(0, width, 1024):
        picked = torch.zeros(1024, width, dtype=torch.bfloat16, device=weight.device)
        picked[:, start : start + 1024].fill_diagonal_(1)
        found = torch.ops.aten._weight_int4pack_mm(picked, qdata, group, plain)[:, :rows]
        numbers[:, start : start + 1024] = (found + 8).T.to(torch.uint8)
    scales, zeros = scale_and_zero[:, :rows].transpose(0, 1).unbind(-1)
    return NibbleLinear, (pack_nibbles(numbers), scales.contiguous(), zeros.contiguous())
