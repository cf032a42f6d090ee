"""Linears whose weights are laid out for the CPU's fastest product with one or a few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mytune.modules.decoder import Decoder
from mytune.modules.lora import is_adapter


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
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product


class TransposedLinear(nn.Module):
    """A linear without bias, for inference on a CPU without AVX-512: its weight lies transposed.

    Only for more outputs than inputs, and float32: then a product with one row was 1.7 times as
    fast with it, with 8 rows 1.1 to 1.2 times; elsewhere it is slower.

    Args:
        weight: [out, in].
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._transposed = weight.detach().t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._transposed


def pack_linears(model: Decoder, batch_size: int = 1) -> None:
    """Lay out a CPU model's plain linears and its head for decoding, in place, for inference.

    Weights are laid out one by one; a tied head keeps its weight beside the other one. Linears with
    adapters and 4-bit ones stay as they are. Does nothing on other devices, or where torch or the
    CPU have nothing faster.
    """
    if model.device.type != "cpu":
        return
    # Names, not modules: a list of those would keep every weight until the last one is packed.
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        if is_adapter(name) or type(weight) is not nn.Parameter:  # torchao has quantized it
            continue
        if packed := _packed(weight, batch_size):
            model.set_submodule(name, packed)
    if model.lm_head is None:
        model.lm_head = _packed(model.embed_tokens.weight, batch_size)  # type: ignore[assignment]


def _packed(weight: Tensor, rows: int) -> nn.Module | None:
    """Return the fastest linear for a weight, or None if that is the plain one."""
    if torch.backends.cpu.get_cpu_capability().startswith("AVX2"):
        wide = weight.dtype is torch.float32 and weight.shape[0] > weight.shape[1]
        return TransposedLinear(weight) if wide else None
    return PackedLinear(weight, rows) if _works(weight.dtype) else None


def _works(dtype: torch.dtype) -> bool:
    """Say whether this torch on this CPU has the operators for a dtype."""
    try:
        linear = PackedLinear(torch.ones(16, 16, dtype=dtype))
        return bool((linear(torch.ones(1, 16, dtype=dtype)) == 16).all())
    except (AttributeError, RuntimeError):
        return False
