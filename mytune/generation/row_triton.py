"""Products of one row with a weight on a GPU, which are all reading the weight: Triton kernels.

A program reads some rows of the weight from end to end. Weights are numbers of 16 or 32 bits, or
of 8 bits with a scale for each row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns that a program reads at once, and its warps: the fastest of tests/gpu/rows.py.
_ROWS, _COLUMNS, _WARPS = 2, 2048, 4


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    out,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start_of_row = row.to(tl.int64) * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        w = tl.load(weight + start_of_row[:, None] + column[None, :]).to(tl.float32)
        total += w * tl.load(x + column).to(tl.float32)[None, :]
    y = tl.sum(total, 1)
    if SCALED:
        y *= tl.load(scale + row).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty))


def fits(weight: Tensor) -> bool:
    """Say whether a weight [out, in] of 8-bit or wider numbers can be given to `row_product`."""
    is_float8 = weight.itemsize == 1 and weight.is_floating_point()
    if is_float8 and torch.cuda.get_device_capability(weight.device) < (8, 9):
        return False
    rows, columns = _tile(weight)
    return columns >= 256 and len(weight) % rows == 0 and weight.is_contiguous()


def _tile(weight: Tensor) -> tuple[int, int]:
    """Return how many rows and columns of a weight a program reads at once."""
    columns = math.gcd(weight.shape[1], _COLUMNS)
    return _ROWS * _COLUMNS // columns, columns


@torch.library.custom_op("mytune::row_product", mutates_args=())
def row_product(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return x W^T in the dtype of x, summed in float32: [..., out].

    Args:
        x: one row, [..., in].
        weight: [out, in], one that `fits`.
        scale: multiplies each output, [out].
    """
    rows, columns = _tile(weight)
    out = x.new_empty((*x.shape[:-1], len(weight)))
    with torch.cuda.device_of(x):
        _product[(len(weight) // rows,)](
            x.contiguous(),
            weight,
            weight if scale is None else scale,
            out,
            weight.shape[1],
            scale is not None,
            rows,
            columns,
            num_warps=_WARPS,
        )
    return out


@row_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))
