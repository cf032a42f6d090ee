"""Linears whose weights are laid out for the fastest product with one or a few rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from mytune.generation.row_linear import Layout, row_layout
from mytune.modules.decoder import Decoder
from mytune.modules.lora import is_adapter
from mytune.quantization.tensors import inner_tensors, numbers_and_scale


class PackedLinear(nn.Module):
    """A linear without bias, for inference on a CPU with AVX-512, reordered by oneDNN.

    The operators are those that torch.compile's freezing puts in the place of linears. Decoding,
    which is all reading weights, was 1.2 to 1.7 times as fast with them, and prefill no slower. On
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
    as fast with 512; as bfloat16's 0.9 to 1.9 times with 1 row, 3 to 8 times with more: "Linears"
    in docs/performance.md.

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

    Its bytes are multiplied as they are; torchao writes them out as bfloat16 for each product. On a
    CPU without AVX-512 it was 2 to 12 times as fast, from 1 row to 512.

    Args:
        weight: [out, in], one that `is_int8`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        inner = inner_tensors(weight)
        self._bytes, self._scale = inner["qdata"], inner["scale"].flatten()
        self._ones = torch.ones_like(self._scale, dtype=torch.bfloat16)  # it takes no float32 scale

    def forward(self, x: Tensor) -> Tensor:
        product = torch._weight_int8pack_mm(x.flatten(0, -2), self._bytes, self._ones)
        return (product * self._scale).to(x.dtype).view(*x.shape[:-1], -1)


def is_int8(weight: Tensor) -> bool:
    """Say whether a weight is of 8-bit numbers and a scale for each row, and nothing else."""
    if weight.dtype is not torch.bfloat16 or weight.shape[1] % 64:
        return False  # the kernel reads whole vectors, beyond the end of others
    return numbers_and_scale(weight, ("Int8Tensor",)) is not None


class Joined(nn.Module):
    """Linears of one input as one: returns what each of them would.

    Args:
        linear: its outputs are theirs, one after the other.
        sizes: the number of outputs of each.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self._sizes = linear, list(sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.linear(x).split(self._sizes, dim=-1)
        return parts


class Part(nn.Module):
    """One of the linears that are joined; it can be called alone, but computes them all."""

    def __init__(self, joined: Joined, index: int) -> None:
        super().__init__()
        self.joined, self._index = joined, index

    def forward(self, x: Tensor) -> Tensor:
        part: Tensor = self.joined(x)[self._index]
        return part


def pack_linears(model: Decoder, batch_size: int = 1, compile: bool = False) -> None:
    """Lay out a model's plain linears and its head for decoding, in place, for inference.

    Weights are laid out one by one; on a CPU a tied head keeps its weight beside the other one.
    Linears with adapters stay as they are, and so do quantized ones whose layout no kernel here
    reads. Does nothing where neither torch nor Triton has something faster.

    Args:
        batch_size: rows that will be usual.
        compile: steps will be compiled, which on a CPU lays weights out itself, and cannot look
            into packed ones: there nothing is done.
    """
    if compile and model.device.type == "cpu":
        return
    for block in model.layers:
        _join(block.attn, ("q_proj", "k_proj", "v_proj"))  # type: ignore[arg-type]
        _join(block.mlp, ("gate_proj", "up_proj"))  # type: ignore[arg-type]
    # Names, not modules: a list of those would keep every weight until the last one is packed.
    names = [name for name, module in model.named_modules() if _is_linear(name, module)]
    for name in names:
        if packed := packed_linear(model.get_parameter(f"{name}.weight"), batch_size):
            model.set_submodule(name, packed)
    if model.lm_head is None and type(model.embed_tokens) is nn.Embedding:
        model.lm_head = packed_linear(model.embed_tokens.weight, batch_size)  # type: ignore[assignment]


def _join(module: nn.Module, names: Sequence[str]) -> None:
    """Join linears of one input, if all of them can be."""
    linears = {name: module.get_submodule(name) for name in names}
    if not all(_is_linear(name, linear) for name, linear in linears.items()):
        return
    weights = [linear.get_parameter("weight") for linear in linears.values()]
    layouts = [layout for weight in weights if (layout := _joinable(weight))]
    kinds = {(kind, *(tensor.dtype for tensor in tensors)) for kind, tensors in layouts}
    if len(layouts) < len(weights) or len(kinds) > 1:
        return
    parts = zip(*(tensors for _, tensors in layouts), strict=True)
    linear = layouts[0][0](*(torch.cat(each) for each in parts))
    joined = Joined(linear, [len(weight) for weight in weights])
    for index, name in enumerate(names):
        module.set_submodule(name, Part(joined, index))


def _is_linear(name: str, module: nn.Module) -> bool:
    """Say whether a module is a linear, and no adapter's."""
    return type(module) is nn.Linear and not is_adapter(name)


def packed_linear(weight: Tensor, rows: int) -> nn.Module | None:
    """Return the fastest linear for a weight, or None if that is the plain one."""
    if layout := _joinable(weight):
        kind, tensors = layout
        return kind(*tensors)
    if weight.device.type != "cpu":
        return None
    if is_int8(weight):
        return Int8Linear(weight)
    onednn = type(weight) is nn.Parameter and _has_avx512() and _works(PackedLinear, weight.dtype)
    return PackedLinear(weight, rows) if onednn else None


def _joinable(weight: Tensor) -> Layout | None:
    """Return the linear that is the fastest, and what it is made of by rows, if it is of this kind.

    Not `HalfLinear` for bfloat16 with AVX-512, which has it too.
    """
    if weight.is_cuda:
        return row_layout(weight)
    if weight.device.type != "cpu" or type(weight) is not nn.Parameter:
        return None
    if weight.dtype is torch.bfloat16 and _has_avx512():
        return None
    fits = _works(HalfLinear, torch.float32) and fits_half(weight)
    return (HalfLinear, (weight.detach(),)) if fits else None


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def _works(kind: Callable[[Tensor], nn.Module], dtype: torch.dtype) -> bool:
    """Say whether this torch on this CPU has the operators of a kind of linear for a dtype."""
    try:
        linear = kind(torch.ones(16, 16, dtype=dtype))
        return bool((linear(torch.ones(1, 16, dtype=dtype)) == 16).all())
    except (AttributeError, RuntimeError):
        return False
