"""Quantizers by torchtune's names and ours, what each is in torchao, and which of them run here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from mytune.errors import ConfigError, ResourceError, first_line
from mytune.quantization.tensors import CLASSES
from mytune.quantization.torchao import torchao

_BF16_ONLY = ("PrototypeInt4WeightOnlyConfig", "Int4WeightOnlyConfig")
_ANY_SHAPE = (64, 1024)  # every usual group divides it


class Quantizer:
    """What a config's `quantizer` names. A config of torchao's may stand in its place."""

    def config(self, device: torch.device) -> Any:
        """Return torchao's config that does this on a device."""
        raise NotImplementedError

    def quantize(self, model: nn.Module) -> nn.Module:
        """Quantize a model's linears in place; torchtune's name for it."""
        quantize_linears(model, self)
        return model


@dataclass(frozen=True)
class Int8WeightOnlyQuantizer(Quantizer):
    """Weights in 8 bits, one scale for each row."""

    def config(self, device: torch.device) -> Any:
        return torchao("quantization").Int8WeightOnlyConfig()


@dataclass(frozen=True)
class Int8DynActInt8WeightQuantizer(Quantizer):
    """Weights and activations in 8 bits: integer products, scales for each row and each token."""

    def config(self, device: torch.device) -> Any:
        return torchao("quantization").Int8DynamicActivationInt8WeightConfig()


@dataclass(frozen=True)
class Int4WeightOnlyQuantizer(Quantizer):
    """Weights in 4 bits, scale and zero for each `groupsize` of a row.

    For bf16, on CUDA from capability 8.0 or on a CPU (groupsize 32, 64 or 128). `inner_k_tiles` is
    torchtune's; torchao has only 8 left.
    """

    groupsize: int = 128
    inner_k_tiles: int = 8

    def config(self, device: torch.device) -> Any:
        if self.inner_k_tiles != 8:
            raise ConfigError(f"quantizer.inner_k_tiles is {self.inner_k_tiles}; it can only be 8")
        if device.type == "cpu":
            int4 = torchao("prototype.quantization.int4")
            return int4.PrototypeInt4WeightOnlyConfig(group_size=self.groupsize)
        # Of the layouts the one whose kernels are torch's own; the others need further packages.
        layouts = torchao("quantization.quantize_.workflows").Int4PackingFormat
        return torchao("quantization").Int4WeightOnlyConfig(
            group_size=self.groupsize, int4_packing_format=layouts.TILE_PACKED_TO_4D
        )


@dataclass(frozen=True)
class Int8DynActInt4WeightQuantizer(Quantizer):
    """Activations in 8 bits, weights in 4: rounded as ExecuTorch does, stored in a byte."""

    groupsize: int = 256

    def config(self, device: torch.device) -> Any:
        configs = torchao("quantization")
        return configs.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=configs.PerGroup(self.groupsize),
        )


@dataclass(frozen=True)
class Float8WeightOnlyQuantizer(Quantizer):
    """Weights in float8 (e4m3), one scale for each row."""

    def config(self, device: torch.device) -> Any:
        return torchao("quantization").Float8WeightOnlyConfig()


@dataclass(frozen=True)
class Float8DynActFloat8WeightQuantizer(Quantizer):
    """Weights and activations in float8: float8 products, scales for each row and each token.

    On CUDA from capability 8.9.
    """

    def config(self, device: torch.device) -> Any:
        configs = torchao("quantization")
        return configs.Float8DynamicActivationFloat8WeightConfig(granularity=configs.PerRow())


QUANTIZERS: tuple[type[Quantizer], ...] = tuple(Quantizer.__subclasses__())


def torchao_config(quantizer: Any, device: torch.device) -> Any:
    """Return torchao's config of a quantizer, or of what already is one.

    Raises:
        ConfigError: it is neither.
        ResourceError: torchao is not installed.
    """
    if isinstance(quantizer, Quantizer):
        return quantizer.config(device)
    if not isinstance(quantizer, torchao("core.config").AOBaseConfig):
        raise ConfigError(
            f"quantizer is a {type(quantizer).__name__}; it can be a config of torchao's, or "
            f"mytune.quantization.{{{', '.join(each.__name__ for each in QUANTIZERS)}}}"
        )
    return quantizer


def describe_config(config: Any) -> dict[str, Any]:
    """Return a config of torchao's as JSON: `_type`, `_version` and `_data`."""
    said: dict[str, Any] = torchao("core.config").config_to_dict(config)
    return said


def quantize_linears(model: nn.Module, quantizer: Any) -> list[str]:
    """Quantize a model's linears in place; return the names of those that stay as they are.

    Embeddings, and a head that is tied to them, are no linears; adapters keep their weights.
    """
    device = next(model.parameters()).device
    config = torchao_config(quantizer, device)
    torchao("quantization").quantize_(model, config, filter_fn=_is_target)
    return [name for name, module in model.named_modules() if _is_target(module, name)]


def _is_target(module: nn.Module, name: str) -> bool:
    """Say whether a module is a linear, no part of an adapter, whose weight is not quantized."""
    is_linear = isinstance(module, nn.Linear) and "lora_" not in name.rpartition(".")[2]
    return is_linear and type(module.weight) is nn.Parameter


def check_quantizer(
    quantizer: Any, model: nn.Module, device: torch.device, dtype: torch.dtype, save: bool = False
) -> None:
    """Try a quantizer on linears shaped like those of a model, which may be on meta.

    Args:
        save: demand that the weights can be saved.

    Raises:
        ConfigError: it is for another dtype, or its groups fit none of the linears.
        ResourceError: this device or this torchao cannot run it; those that run are listed.
    """
    name, shapes = type(quantizer).__name__, _shapes(model)
    _check_groupsize(getattr(quantizer, "groupsize", None), name, shapes)
    config = torchao_config(quantizer, device)
    told = ", ".join(f"{rows} x {width}" for rows, width in shapes)
    if dtype is not torch.bfloat16 and type(config).__name__ in _BF16_ONLY:
        raise ConfigError(
            f"{name} is for dtype=bf16, not {str(dtype).removeprefix('torch.')}: its kernels have "
            "no other (on a CPU they would be 66 times slower than no quantization)"
        )
    try:
        try_config(config, _ANY_SHAPE, device, dtype)
    except Exception as error:
        can = runnable(device, dtype)
        if name not in can:  # else it is its settings that do not fit
            raise ResourceError(
                f"{name} cannot run with torchao {version('torchao')} on {device}: "
                f"{type(error).__name__}: {first_line(error)}",
                [f"these can: {', '.join(can) or 'none'}"],
            ) from error
    try:
        kinds = {try_config(config, shape, device, dtype) for shape in shapes}
    except Exception as error:
        raise ConfigError(
            f"{name} does not fit the model, whose linears are {told}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if kinds == {nn.Parameter}:
        raise ConfigError(
            f"{name} would quantize nothing: its group divides no row of the model's linears, "
            f"which are {told}; choose a smaller groupsize"
        )
    odd = {kind.__name__ for kind in kinds} - {*CLASSES, "Parameter"}
    if save and odd:
        raise ConfigError(f"{name} makes {', '.join(odd)}, which torchao cannot save safely")


def _check_groupsize(groupsize: int | None, name: str, shapes: list[tuple[int, int]]) -> None:
    """Raise ConfigError unless groups divide the inputs of some linear."""
    widths = sorted({width for _, width in shapes})
    if groupsize is None or (groupsize > 0 and any(width % groupsize == 0 for width in widths)):
        return
    fitting = math.gcd(*widths)
    fitting = min(128, fitting & -fitting)  # the largest power of two, of those that are usual
    raise ConfigError(
        f"quantizer.groupsize is {groupsize}, and {name}'s groups must divide the inputs of the "
        f"model's linears, which are {', '.join(map(str, widths))}: {fitting} does"
    )


def _shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Return the outputs and inputs of a model's linears, each but once."""
    linears = [m for name, m in model.named_modules() if _is_target(m, name)]
    shapes = {(m.out_features, m.in_features) for m in linears if isinstance(m, nn.Linear)}
    if not shapes:
        raise ConfigError("quantizer: the model has no linears that could be quantized")
    return sorted(shapes)


def try_config(
    config: Any, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> type:
    """Quantize a linear and use it; return the class of its weight, or raise what fails.

    It has the inputs that are asked for, and a few outputs with the same remainders.
    """
    rows, width = shape[0] % 64 + 64, shape[1]
    linear = nn.Linear(width, rows, bias=False, device="meta")  # random weights would move a seed
    weight = torch.linspace(-1, 1, linear.weight.numel(), device=device, dtype=dtype)
    linear.weight = nn.Parameter(weight.view_as(linear.weight))
    torchao("quantization").quantize_(nn.Sequential(linear), config)
    with torch.inference_mode():
        for tokens in (1, 32):
            linear(torch.ones(tokens, width, device=device, dtype=dtype)).sum().item()
    return type(linear.weight)


def runnable(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the names of the quantizers that run on a device in a dtype."""
    return [each.__name__ for each in QUANTIZERS if _runs(each, device, dtype)]


def _runs(kind: type[Quantizer], device: torch.device, dtype: torch.dtype) -> bool:
    try:
        config = kind().config(device)
        try_config(config, _ANY_SHAPE, device, dtype)
    except Exception:
        return False
    return dtype is torch.bfloat16 or type(config).__name__ not in _BF16_ONLY
