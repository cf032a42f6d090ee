"""Linears for decoding on a GPU: with one row they take the time of reading their weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mytune._triton import HAS_TRITON
from mytune.quantization.tensors import inner_tensors, numbers_and_scale

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


class TileLinear(nn.Module):
    """A linear with torchao's 4-bit weight for bfloat16 on a GPU, in tiles.

    Args:
        tiles: 4-bit numbers, int32 [out / 8, in / 128, 32, 4].
        scales: scale and zero of each group of a row, [out, in / group, 2].
    """

    def __init__(self, tiles: Tensor, scales: Tensor) -> None:
        super().__init__()
        self._group = _columns(tiles) // scales.shape[1]
        self.tiles = nn.Parameter(tiles, requires_grad=False)
        self.scales = nn.Parameter(scales.transpose(0, 1).contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        one_row = x.numel() == x.shape[-1] and x.dtype is torch.bfloat16
        if HAS_TRITON and one_row and x.shape[-1] % 1024 == 0:
            from mytune.generation.tile_triton import tile_product

            product: Tensor = tile_product(x, self.tiles, self.scales)
            return product
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # torch's kernel wants it so
        y: Tensor = torch._weight_int4pack_mm(rows, self.tiles, self._group, self.scales)
        return y.view(*x.shape[:-1], -1)


def tile_layout(weight: Tensor) -> Layout | None:
    """Return the linear for a weight that is 4-bit tiles, and these; None if they are padded."""
    if type(weight).__name__ != "Int4TilePackedTo4dTensor":
        return None
    inner = inner_tensors(weight)
    if inner.keys() != {"qdata", "scale_and_zero"}:
        return None
    tiles, scales = inner["qdata"], inner["scale_and_zero"]
    usual = tiles.shape[2:] == (32, 4) and tiles.is_contiguous() and torch.version.hip is None
    if not usual or (8 * len(tiles), _columns(tiles)) != weight.shape:
        return None
    return TileLinear, (tiles, scales.transpose(0, 1))


def _columns(tiles: Tensor) -> int:
    return 32 * tiles.shape[1] * tiles.shape[3]


def row_layout(weight: Tensor) -> Layout | None:
    """Return the linear that is made for a weight on a GPU and its tensors by rows, or None."""
    if layout := tile_layout(weight):
        return layout
    if not HAS_TRITON:
        return None
    from mytune.generation.row_triton import fits

    if type(weight) is nn.Parameter and weight.is_floating_point():
        return (RowLinear, (weight.detach(),)) if fits(weight) else None
    parts = numbers_and_scale(weight, KINDS)
    return (RowLinear, parts) if parts and fits(parts[0]) else None
