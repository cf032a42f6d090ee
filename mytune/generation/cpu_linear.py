"""Linears for decoding on a CPU: weights in the layouts of torch's operators for few rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mytune.generation.row_linear import Layout
from mytune.quantization.tensors import numbers_and_scale

_EPSILON = torch.finfo(torch.float32).eps


class PackedLinear(nn.Module):
    """A linear without bias, for inference on a CPU with AVX-512, reordered by oneDNN.

    The operators are those that torch.compile's freezing puts in the place of linears. Decoding,
    which is all reading weights, was 1 to 1.7 times as fast with them, prefill 0.8 to 1.1 times. On
    a CPU without AVX-512 it was slower.

    Args:
        weight: [out, in].
        rows: how many rows of input will be usual; any number works.
    """

    def __init__(self, weight: Tensor, rows: int = 1) -> None:
        super().__init__()
        self.nbytes = weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product


class HalfLinear(nn.Module):
    """A linear without bias, for inference on a CPU: its weight lies as float16, in FBGEMM's tiles.

    Products are computed in float32, and read half of what a float32 weight takes. On a CPU without
    AVX-512 they were 1.2 to 3.5 times as fast as float32's with 1 row, 1.7 to 3.2 times with 8, and
    as fast with 512; as bfloat16's 0.9 to 1.9 times with 1 row, 3 to 8 times with more. On a Xeon
    with AVX-512 1.1 to 1.8 times as fast as float32's with 1 row, 1.7 to 3.6 with 8, 0.6 to 1.1
    with more; on an EPYC 2.2 to 5.6, 2 to 5 and 1 to 1.6: "Linears" in docs/performance.md. There
    `PackedLinear` in bfloat16 is faster from 3 rows on, and with AMX always.

    Args:
        weight: [out, in], one that `fits_half`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = _scale(weight)
        self.nbytes = 2 * weight.numel()
        self._unscale = 1 / scale
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.detach() * scale, None)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x * self._unscale, self._packed)
        return product.to(x.dtype)


def fits_half(weight: Tensor) -> bool:
    """Say whether float16 holds a weight's numbers, once a power of two has scaled them.

    It does if they were bfloat16 or float16 in the checkpoint; what is 10^9 times smaller than the
    largest may be off by 10^-12 of that.
    """
    scale = _scale(weight)
    for part in weight.detach().split(4096):
        scaled = part * scale
        if not (scaled.half() - scaled).abs().max() <= 2**-25:  # nan is not
            return False
    return True


def _scale(weight: Tensor) -> Tensor:
    """Return the power of two that brings a weight's largest number near float16's: [1], float32.

    It is no scalar, so that what it is multiplied with becomes float32.
    """
    largest = weight.detach().abs().max().item()
    return torch.tensor([2.0 ** (15 - math.frexp(largest)[1])])


class Int8Linear(nn.Module):
    """A linear with torchao's 8-bit weight, for inference in bfloat16 on a CPU.

    torchao writes the weight out as bfloat16 for each product. Here a few rows are multiplied with
    its bytes as they are, which takes a time for each row; more with a part of it after the other,
    which stays in the cache: "Linears" in docs/performance.md.

    Args:
        weight: 8-bit numbers [out, in].
        scale: what each row of them is multiplied with, [out].
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self._scale = scale.bfloat16()  # torchao's products have it so
        self._dtype = torch.bfloat16 if _has_avx512() else torch.float32  # the faster one

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= 16:
            y = torch._weight_int8pack_mm(rows, self.weight, self._scale)
        else:
            rows = rows.to(self._dtype)
            parts = zip(self.weight.split(512), self._scale.split(512), strict=True)
            products = [F.linear(rows, part.to(rows.dtype)) * scale for part, scale in parts]
            y = torch.cat(products, dim=1).to(x.dtype)
        return y.view(*x.shape[:-1], -1)


class DynamicInt8Linear(Int8Linear):
    """A linear with torchao's 8-bit weight whose inputs are rounded to 8 bits, too, on a CPU.

    The numbers are torchao's but for roundings to bfloat16, of which that has more; it takes a
    dozen operators more for each product.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        unit = (rows.abs().amax(1, keepdim=True) / 127.5).float().clamp_(min=_EPSILON)
        numbers = (rows * unit.reciprocal()).round_().clamp_(-128, 127).to(torch.int8)
        product: Tensor = int8_product(numbers, self.weight) * unit
        return product.mul_(self.scale).to(x.dtype).view(*x.shape[:-1], -1)


@torch.library.custom_op("mytune::int8_product", mutates_args=())
def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T of 8-bit numbers [rows, in] and [out, in] as 32-bit ones, [rows, out].

    It is torch's, but torch.compile cannot look into it: what that makes of one row has a stride of
    0, which torch (2.11 and 2.13) multiplies wrongly.
    """
    return torch._int_mm(x.contiguous().as_strided(x.shape, (x.shape[1], 1)), weight.t())


@int8_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((len(x), len(weight)), dtype=torch.int32)


def cpu_layout(weight: Tensor, tokens: int) -> Layout | None:
    """Return the fastest linear for a weight on a CPU and its tensors by rows, or None.

    `tokens` are read at once on average.

    `PackedLinear` is not of this kind: linears of its packed weights cannot be joined.
    """
    if type(weight) is not nn.Parameter:
        return _int8_layout(weight)
    if weight.dtype is torch.bfloat16 and _has_avx512() and (tokens > 2 or _has_amx()):
        return None
    fits = works(HalfLinear, torch.float32) and fits_half(weight)
    return (HalfLinear, (weight.detach(),)) if fits else None


def _int8_layout(weight: Tensor) -> Layout | None:
    """Return the linear for a weight that is 8-bit numbers and a scale for each row, or None."""
    if parts := numbers_and_scale(weight, ("Int8Tensor",), with_inputs=True):
        return DynamicInt8Linear, parts
    if weight.dtype is not torch.bfloat16 or has_unaligned_rows(weight):
        return None
    parts = numbers_and_scale(weight, ("Int8Tensor",))
    return (Int8Linear, parts) if parts else None


def has_unaligned_rows(weight: Tensor) -> bool:
    """Say whether torch's kernel for 8-bit weights would read beyond the end of their rows.

    It takes 16 numbers at once. torch.compile uses it for what it recognizes as such a product.
    """
    return weight.shape[1] % 16 != 0


def onednn_packs(weight: Tensor) -> bool:
    """Say whether a weight can be `PackedLinear`'s, and should."""
    return type(weight) is nn.Parameter and _has_avx512() and works(PackedLinear, weight.dtype)


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _has_amx() -> bool:
    """Say whether the CPU has units for products of bfloat16 matrices."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@cache
def works(kind: Callable[[Tensor], nn.Module], dtype: torch.dtype) -> bool:
    """Say whether this torch on this CPU has the operators of a kind of linear for a dtype."""
    try:
        linear = kind(torch.ones(16, 16, dtype=dtype))
        return bool((linear(torch.ones(1, 16, dtype=dtype)) == 16).all())
    except (AttributeError, RuntimeError):
        return False
