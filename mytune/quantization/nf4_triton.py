"""NF4 to full precision in one pass on a GPU: a Triton kernel, as an operator that compiles."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mytune.quantization.nf4 import BLOCK, GROUP, LEVELS

_BYTES = 1024  # codes, of two weights each, that a program reads


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def]
    codes,
    scales,
    steps,
    levels,
    weight,
    count,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BYTES
    byte = start + tl.arange(0, BYTES)
    here = byte * 2 < count
    code = tl.load(codes + byte, mask=here, other=0).to(tl.int32)
    block = byte * 2 // BLOCK
    scale = tl.load(scales + block, mask=here, other=0).to(tl.float32)
    largest = scale * tl.load(steps + block // GROUP, mask=here, other=0).to(tl.float32)
    # The 16 levels are one cache line, in which every thread finds its own at once.
    high = tl.load(levels + (code >> 4)) * largest
    low = tl.load(levels + (code & 15)) * largest
    out = start * 2 + tl.arange(0, 2 * BYTES)
    pairs = tl.interleave(high, low).to(weight.dtype.element_ty)
    tl.store(weight + out, pairs, mask=out < count)


@torch.library.custom_op("mytune::dequantize_nf4", mutates_args=())
def dequantize_kernel(
    codes: Tensor, scales: Tensor, steps: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [rows, columns], bit for bit what the table gives in `dequantize_nf4`."""
    weight = codes.new_empty((rows, columns), dtype=dtype)
    count = weight.numel()
    packed = [tensor.contiguous() for tensor in (codes, scales, steps)]
    with torch.cuda.device_of(codes):
        _dequantize[(triton.cdiv(count, 2 * _BYTES),)](
            *packed, _levels(codes.device), weight, count, _BYTES, BLOCK, GROUP
        )
    return weight


@dequantize_kernel.register_fake
def _(
    codes: Tensor, scales: Tensor, steps: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((rows, columns), dtype=dtype)


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)
