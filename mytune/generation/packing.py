"""Linears whose weights are laid out for the fastest product with one or a few rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mytune.generation.cpu_linear import (
    HalfLinear,
    PackedLinear,
    cpu_layout,
    has_unaligned_rows,
    onednn_packs,
)
from mytune.generation.row_linear import Layout, row_layout
from mytune.modules.decoder import Decoder
from mytune.modules.lora import is_adapter
from mytune.quantization.tensors import rounds_inputs


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


def pack_linears(model: Decoder, rows: int = 1, tokens_per_pass: int | None = None) -> None:
    """Lay out a model's plain linears and its head for decoding, in place, for inference.

    Weights are laid out one by one; on a CPU a tied head keeps its weight beside the other one.
    Linears with adapters stay as they are, and so do quantized ones whose layout no kernel here
    reads. Does nothing where neither torch nor Triton has something faster. On a CPU torch.compile
    fails on a whole model with packed linears: see `can_compile`.

    Args:
        rows: of a step of decoding.
        tokens_per_pass: what a pass over the weights reads on average, prompts included; as many as
            there are rows if None.
    """
    tokens = tokens_per_pass or rows
    for block in model.layers:
        _join(block.attn, ("q_proj", "k_proj", "v_proj"), tokens)  # type: ignore[arg-type]
        _join(block.mlp, ("gate_proj", "up_proj"), tokens)  # type: ignore[arg-type]
    # Names, not modules: a list of those would keep every weight until the last one is packed.
    names = [name for name, module in model.named_modules() if _is_linear(name, module)]
    for name in names:
        # The head reads the last token of a prompt alone.
        read = rows if name == "lm_head" else tokens
        if packed := packed_linear(model.get_parameter(f"{name}.weight"), rows, read):
            model.set_submodule(name, packed)
    if model.lm_head is None and type(model.embed_tokens) is nn.Embedding:
        model.lm_head = packed_linear(model.embed_tokens.weight, rows, rows)  # type: ignore[assignment]


def _join(module: nn.Module, names: Sequence[str], tokens: int) -> None:
    """Join linears of one input, if all of them can be."""
    linears = {name: module.get_submodule(name) for name in names}
    if not all(_is_linear(name, linear) for name, linear in linears.items()):
        return
    weights = [linear.get_parameter("weight") for linear in linears.values()]
    layouts = [layout for weight in weights if (layout := _joinable(weight, tokens))]
    kinds = {(kind, *(tensor.dtype for tensor in tensors)) for kind, tensors in layouts}
    if len(layouts) < len(weights) or len(kinds) > 1:
        return
    parts = zip(*(tensors for _, tensors in layouts), strict=True)
    linear = layouts[0][0](*(torch.cat(each) for each in parts))
    joined = Joined(linear, [len(weight) for weight in weights])
    for index, name in enumerate(names):
        module.set_submodule(name, Part(joined, index))


def _is_linear(name: str, module: nn.Module) -> bool:
    """Say whether a module is a linear without bias, and no adapter's."""
    return type(module) is nn.Linear and module.bias is None and not is_adapter(name)


def packed_linear(weight: Tensor, rows: int, tokens: int) -> nn.Module | None:
    """Return the fastest linear for a weight, or None if that is the plain one.

    Args:
        rows: of a step of decoding.
        tokens: that are read at once on average.
    """
    if layout := _joinable(weight, tokens):
        kind, tensors = layout
        return kind(*tensors)
    if weight.device.type == "cpu" and onednn_packs(weight):
        return PackedLinear(weight, rows)
    return None


def _joinable(weight: Tensor, tokens: int) -> Layout | None:
    """Return the fastest linear, and what it is made of by rows, if that can be said of it."""
    if weight.is_cuda:
        return row_layout(weight)
    return cpu_layout(weight, tokens) if weight.device.type == "cpu" else None


# What to tell a user who asks for it, by `can_compile`.
COMPILES = {
    True: "the first tokens take a while",
    False: "left out: on a CPU it is for quantized weights, and not for all of them; nowhere for "
    "a model with a forward pass of its own",
}


def can_compile(model: Decoder) -> bool:
    """Say whether torch.compile can be used on a model's blocks.

    They are compiled without the `forward` of the whole model, which must be the decoder's. On a
    CPU it cannot look into packed weights, and has nothing faster; and what it makes of some
    of torchao's products is wrong: see `int8_product` and `has_unaligned_rows`.
    """
    if type(model).forward is not Decoder.forward:
        return False
    if model.device.type != "cpu":
        return True
    packed = (HalfLinear, PackedLinear)
    linears = [each.weight for each in model.layers.modules() if isinstance(each, nn.Linear)]
    wrong = any(rounds_inputs(each) or _is_unaligned_int8(each) for each in linears)
    return not wrong and not any(isinstance(module, packed) for module in model.layers.modules())


def _is_unaligned_int8(weight: Tensor) -> bool:
    return type(weight).__name__ == "Int8Tensor" and has_unaligned_rows(weight)
