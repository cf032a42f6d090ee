"""Products of one row with a weight on a GPU, which are all reading the weight: Triton kernels.

A program reads some rows of the weight from end to end. Weights are floating-point numbers, or
integers of 8 bits; those of 8 bits have a scale for each row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns that a program reads at once, and its warps: the fastest of tests/gpu/rows.py.
_ROWS, _COLUMNS, _WARPS = 2, 2048, 4
# The same for integers and x in bfloat16, always 4 rows. Not measured yet.
_INT8_COLUMNS, _INT8_WARPS = 2048, 4
# 2^15 as a float32: a byte that is put into its bits 8 to 15 is added to it. Converting integers is
# slow. It is an argument, as a constant would cost an instruction each time.
_2_TO_15 = 0x47000000


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
def low(pair):  # type: ignore[no-untyped-def]
    """Return the first of two bfloat16 numbers in 32 bits."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def high(pair):  # type: ignore[no-untyped-def]
    """Return the second of two bfloat16 numbers in 32 bits."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _number(word, power):  # type: ignore[no-untyped-def]
    """Return the number in bits 8 to 15, of which 0 to 255 stand for -128 to 127."""
    return (word & 0xFF00 | power).to(tl.float32, bitcast=True) - (32768 + 128)


@triton.jit  # type: ignore[untyped-decorator]
def _add(total, words, x01, x23, power):  # type: ignore[no-untyped-def]
    """Add the products of words of 4 bytes with pairs of x."""
    words = tl.load(words) ^ -0x7F7F7F80  # 0x80808080
    total += _number(words << 8, power) * low(x01)
    total += _number(words, power) * high(x01)
    total += _number(words >> 8, power) * low(x23)
    return total + _number(words >> 16, power) * high(x23)


@triton.jit  # type: ignore[untyped-decorator]
def _store(out, total, scale):  # type: ignore[no-untyped-def]
    y = tl.sum(total, 0) * tl.load(scale).to(tl.float32)
    tl.store(out, y.to(out.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _int8_product(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    out,
    power,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * 4
    word = tl.arange(0, COLUMNS // 4)
    total0 = tl.zeros((COLUMNS // 4,), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for start in range(0, WORDS, COLUMNS // 4):
        w = weight + row.to(tl.int64) * WORDS + start + word
        four = tl.load(x + start + word)
        x01, x23 = four.to(tl.int32), (four >> 32).to(tl.int32)
        total0 = _add(total0, w, x01, x23, power)
        total1 = _add(total1, w + WORDS, x01, x23, power)
        total2 = _add(total2, w + 2 * WORDS, x01, x23, power)
        total3 = _add(total3, w + 3 * WORDS, x01, x23, power)
    _store(out + row, total0, scale + row)
    _store(out + row + 1, total1, scale + row + 1)
    _store(out + row + 2, total2, scale + row + 2)
    _store(out + row + 3, total3, scale + row + 3)


def fits(weight: Tensor) -> bool:
    """Say whether a weight [out, in] of floats or 8-bit integers can be given to `row_product`."""
    is_float8 = weight.itemsize == 1 and weight.is_floating_point()
    if is_float8 and torch.cuda.get_device_capability(weight.device) < (8, 9):
        return False
    if weight.dtype is torch.int8 and weight.storage_offset() % 4:  # it is read as words
        return False
    rows, columns = _tile(weight)
    return columns >= 256 and len(weight) % rows == 0 and weight.is_contiguous()


def aligned(x: Tensor) -> Tensor:
    """Return a row of numbers of 16 bits, [in], that can be read as words of 64."""
    x = x.reshape(-1).contiguous()
    return x.clone() if x.storage_offset() % 4 else x


def _tile(weight: Tensor) -> tuple[int, int]:
    """Return how many rows and columns of a weight a program reads at once."""
    if weight.dtype is torch.int8:
        return 4, math.gcd(weight.shape[1], _INT8_COLUMNS)
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
        if weight.dtype is torch.int8 and x.dtype is torch.bfloat16 and scale is not None:
            _int8_product[(len(weight) // rows,)](
                aligned(x).view(torch.int64),
                weight.view(torch.int32),
                scale,
                out,
                _2_TO_15,
                weight.shape[1] // 4,
                columns,
                num_warps=_INT8_WARPS,
            )
            return out
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
