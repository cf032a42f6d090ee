"""Products of one row with a weight on a GPU, which are all reading the weight: Triton kernels.

A program reads some rows of the weight from end to end. Weights are numbers of 16 or 32 bits, of 8
bits with a scale for each row, or of 4 bits with scale and zero for each group of a row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a program, columns it reads at a time, warps: measured by tests/gpu/bench.py's shapes.
_PLAIN = (4, 1024, 4)
_BYTES = (4, 1024, 4)
_NIBBLES = (8, 8, 4)  # groups instead of columns


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


@triton.jit  # type: ignore[untyped-decorator]
def _product_of_nibbles(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    zeros,
    out,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    HALF: tl.constexpr = WIDTH // 2
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    for start in range(0, HALF // GROUP, GROUPS):
        group = start + tl.arange(0, GROUPS)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        code = tl.load(codes + (row * HALF)[:, None, None] + column[None, :, :])
        at = (row * (WIDTH // GROUP))[:, None] + group[None, :]
        x_low = tl.load(x + column).to(tl.float32)
        low = tl.sum((code & 15).to(tl.float32) * x_low[None, :, :], 2)
        scale = tl.load(scales + at).to(tl.float32)
        zero = tl.load(zeros + at).to(tl.float32)
        total += scale * low + (zero - 8 * scale) * tl.sum(x_low, 1)[None, :]
        at += HALF // GROUP
        x_high = tl.load(x + HALF + column).to(tl.float32)
        high = tl.sum((code >> 4).to(tl.float32) * x_high[None, :, :], 2)
        scale = tl.load(scales + at).to(tl.float32)
        zero = tl.load(zeros + at).to(tl.float32)
        total += scale * high + (zero - 8 * scale) * tl.sum(x_high, 1)[None, :]
    tl.store(out + row, tl.sum(total, 1).to(out.dtype.element_ty))


def fits(weight: Tensor) -> bool:
    """Say whether a weight [out, in] of 8-bit or wider numbers can be given to `row_product`."""
    rows, columns, _ = _BYTES if weight.itemsize == 1 else _PLAIN
    return not (len(weight) % rows or weight.shape[1] % columns) and weight.is_contiguous()


@torch.library.custom_op("mytune::row_product", mutates_args=())
def row_product(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return x W^T in the dtype of x, summed in float32: [..., out].

    Args:
        x: one row, [..., in].
        weight: [out, in], one that `fits`.
        scale: multiplies each output, [out].
    """
    rows, columns, warps = _BYTES if weight.itemsize == 1 else _PLAIN
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
            num_warps=warps,
        )
    return out


@row_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def pack_nibbles(numbers: Tensor) -> Tensor:
    """Return numbers 0 to 15, uint8 [out, in], two to a byte: column i and i + in / 2."""
    low, high = numbers.chunk(2, dim=1)
    return (low | high << 4).contiguous()


def unpack_nibbles(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the weight [out, in] that codes stand for, in the dtype of the scales."""
    numbers = torch.cat((codes & 15, codes >> 4), dim=1).to(scales.dtype) - 8
    groups = numbers.unflatten(1, (scales.shape[1], -1))
    weight: Tensor = groups * scales[..., None] + zeros[..., None]
    return weight.flatten(1)


@torch.library.custom_op("mytune::row_product_of_nibbles", mutates_args=())
def row_product_of_nibbles(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return x W^T in the dtype of x, summed in float32: [..., out].

    Args:
        x: one row, [..., in].
        codes: of `pack_nibbles`, [out, in / 2]; out is a multiple of 8.
        scales: of groups, [out, groups].
        zeros: alike; a number n stands for (n - 8) * scale + zero.
    """
    rows, most, warps = _NIBBLES
    width = 2 * codes.shape[1]
    group = width // scales.shape[1]
    groups = math.gcd(width // 2 // group, most)
    out = x.new_empty((*x.shape[:-1], len(codes)))
    with torch.cuda.device_of(x):
        _product_of_nibbles[(len(codes) // rows,)](
            x.contiguous(), codes, scales, zeros, out, width, group, rows, groups, num_warps=warps
        )
    return out


@row_product_of_nibbles.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(codes)))
