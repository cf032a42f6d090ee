"""Products of one row with 4-bit weights in torch's tiles on a GPU: a Triton kernel.

torch's own kernel multiplies 16 rows at once, whatever there is. This one reads the same tiles. A
tile is 8 rows of the weight, 8 numbers in a word of 32 bits, as `torch._convert_weight_to_int4pack`
lays them out with 8 inner tiles. For every 128 columns there are 32 lanes of 4 words; 4 lanes side
by side hold a row. Word w of lane l begins with column 32 w + 2 (l % 4); from its lowest bits on it
has columns 0, 8, 16, 24, 1, 9, 17 and 25 from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mytune.generation.row_triton import aligned, high, low

_COLUMNS = 1024  # that a program reads at once: every width in tiles is a multiple
# A program has 4 tiles, which share what is done to x, if so many programs are left; else 2 or 1.
# Not measured yet: tests/gpu/rows.py tries some.
_PROGRAMS, _WARPS = 256, 4

# Powers of 2 as float32: a number that is put into bits 12 to 15 of 2^11, or into bits 16 to 19 of
# 2^7, is added to it. Converting integers is slow. They are arguments, as constants would cost an
# instruction each time.
_2_TO_11, _2_TO_7 = 0x45000000, 0x43000000


@triton.jit  # type: ignore[untyped-decorator]
def _at_12(words, power):  # type: ignore[no-untyped-def]
    """Return 2^11 and the number in bits 12 to 15."""
    return (words & 0xF000 | power).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _at_16(words, power):  # type: ignore[no-untyped-def]
    """Return 2^7 and the number in bits 16 to 19."""
    return (words & 0xF0000 | power).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _add(total, words, scales, x0, x8, x16, x24, p11, p7, excess, sum_of_x):  # type: ignore[no-untyped-def]
    """Add the products of a tile's words with pairs of x; `total` has a column for each scale."""
    words, scale_and_zero = tl.load(words), tl.load(scales)
    dot = _at_16(words << 16, p7) * low(x0) - excess
    dot += _at_12(words << 8, p11) * low(x8)
    dot += _at_16(words << 8, p7) * low(x16)
    dot += _at_12(words, p11) * low(x24)
    dot += _at_16(words, p7) * high(x0)
    dot += _at_12(words >> 8, p11) * high(x8)
    dot += _at_16(words >> 8, p7) * high(x16)
    dot += _at_12(words >> 16, p11) * high(x24)
    if total.shape[1] == 1:
        dot = tl.sum(dot, 1, keep_dims=True)
    return total + low(scale_and_zero) * dot + high(scale_and_zero) * sum_of_x


@triton.jit  # type: ignore[untyped-decorator]
def _store(out, total):  # type: ignore[no-untyped-def]
    """Store the sums of a tile's 8 rows; 4 lanes side by side hold one."""
    lanes = tl.reshape(tl.sum(total, 1), (total.shape[0] // 32, 8, 4))
    tl.store(out + tl.arange(0, 8), tl.sum(tl.sum(lanes, 2), 0).to(out.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x,
    tiles,
    scales,
    out,
    p11,
    p7,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A lane's words have one scale, or one each.
    SCALES: tl.constexpr = 1 if GROUP >= 128 else 4
    tile = tl.program_id(0) * TILES
    lane = tl.arange(0, COLUMNS // 4)[:, None]
    word = lane * 4 + tl.arange(0, 4)[None, :]
    pair = word // 128 * 64 + word % 4 * 16 + word // 4 % 4
    column = lane // 32 * 128 + tl.arange(0, SCALES)[None, :] * 32
    total0 = tl.zeros((COLUMNS // 4, SCALES), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for start in range(0, WIDTH, COLUMNS):
        w = tiles + tile.to(tl.int64) * WIDTH + start + word
        s = scales + (start + column) // GROUP * HEIGHT + tile * 8 + lane // 4 % 8
        x0 = tl.load(x + start // 2 + pair)
        x8 = tl.load(x + start // 2 + pair + 4)
        x16 = tl.load(x + start // 2 + pair + 8)
        x24 = tl.load(x + start // 2 + pair + 12)
        at_12 = low(x8) + high(x8) + low(x24) + high(x24)
        at_16 = low(x0) + high(x0) + low(x16) + high(x16)
        excess = (2048 + 8) * at_12 + (128 + 8) * at_16  # 0 to 15 stand for -8 to 7
        sum_of_x = at_12 + at_16
        if SCALES == 1:
            sum_of_x = tl.sum(sum_of_x, 1, keep_dims=True)
        total0 = _add(total0, w, s, x0, x8, x16, x24, p11, p7, excess, sum_of_x)
        if TILES > 1:
            total1 = _add(total1, w + WIDTH, s + 8, x0, x8, x16, x24, p11, p7, excess, sum_of_x)
        if TILES > 2:
            w, s = w + 2 * WIDTH, s + 16
            total2 = _add(total2, w, s, x0, x8, x16, x24, p11, p7, excess, sum_of_x)
            total3 = _add(total3, w + WIDTH, s + 8, x0, x8, x16, x24, p11, p7, excess, sum_of_x)
    _store(out + tile * 8, total0)
    if TILES > 1:
        _store(out + tile * 8 + 8, total1)
    if TILES > 2:
        _store(out + tile * 8 + 16, total2)
        _store(out + tile * 8 + 24, total3)


@torch.library.custom_op("mytune::tile_product", mutates_args=())
def tile_product(x: Tensor, tiles: Tensor, scales: Tensor) -> Tensor:
    """Return x W^T in bfloat16, summed in float32: [..., out].

    Args:
        x: one row of bfloat16, [..., in].
        tiles: 4-bit numbers, int32 [out / 8, in / 128, 32, 4].
        scales: scale and zero of each group of a row in bfloat16, [in / group, out, 2]: a number
            from 0 to 15 is a weight of (number - 8) * scale + zero.
    """
    count, width = len(tiles), x.shape[-1]
    together = next(n for n in (4, 2, 1) if count % n == 0 and (n == 1 or count // n >= _PROGRAMS))
    out = x.new_empty((*x.shape[:-1], 8 * count))
    with torch.cuda.device_of(x):
        _product[(count // together,)](
            aligned(x).view(torch.int32),
            tiles,
            scales.view(torch.int32),
            out,
            _2_TO_11,
            _2_TO_7,
            WIDTH=width,
            HEIGHT=8 * count,
            GROUP=width // len(scales),
            TILES=together,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
        )
    return out


@tile_product.register_fake
def _(x: Tensor, tiles: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 8 * len(tiles)))
