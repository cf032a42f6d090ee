"""LoRA, DoRA and rsLoRA as a change to a built model: named linears gain adapters.

LoRA: https://arxiv.org/abs/2106.09685, rsLoRA: https://arxiv.org/abs/2312.03732, DoRA:
https://arxiv.org/abs/2402.09353. Parameter names are PEFT's: `lora_A.weight` [rank, in],
`lora_B.weight` [out, rank], `lora_magnitude_vector` [out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mytune._sharded import fill, whole
from mytune.errors import CheckpointError, ConfigError, check_at_least, did_you_mean
from mytune.modules.derived import Derived, dropped, product
from mytune.quantization.nf4 import NF4Embedding, NF4Linear
from mytune.quantization.tensors import is_quantized


@dataclass(frozen=True)
class LoRAConfig:
    """What is adapted and how."""

    modules: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """What the update is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class _LoRA(nn.Module):
    """What a linear gains: y = W x + scaling * B A x, or DoRA's rescaling of that sum.

    Adapters are float32 whatever the weight is: bfloat16 would round small updates away.
    """

    in_features: int
    out_features: int
    lora: LoRAConfig
    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_magnitude_vector: nn.Parameter | None
    takes_derived = True

    def add_adapter(self, lora: LoRAConfig) -> None:
        """Give an adopted linear its adapters, uninitialised, on the device of its weight."""
        device = next(self.parameters()).device
        linear = partial(nn.Linear, bias=False, device=device, dtype=torch.float32)
        self.lora = lora
        self.lora_A = linear(self.in_features, lora.rank)
        self.lora_B = linear(lora.rank, self.out_features)
        magnitude = torch.empty(self.out_features, device=device) if lora.use_dora else None
        self.lora_magnitude_vector = None if magnitude is None else nn.Parameter(magnitude)

    def delta(self) -> Tensor:
        """Return scaling * B A in float32: [out, in]."""
        return self.lora.scaling * (whole(self.lora_B.weight) @ whole(self.lora_A.weight))

    def merged_weight(self) -> Tensor:
        """Return a new weight [out, in] that does what weight and adapter do together."""
        weight = base_weight(self)
        merged = weight.float() + self.delta()
        if self.lora_magnitude_vector is not None:
            merged *= (whole(self.lora_magnitude_vector) / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)

    def forward(self, x: Tensor | Derived) -> Tensor:
        x = x if isinstance(x, Derived) else Derived(x)
        y = super().forward(x.value)
        low = product(self._dropout(x), self.lora_A.weight)
        # Scaled where it is small: else the gradient, too, is written out once more, in full width.
        y = y + F.linear(low * self.lora.scaling, self.lora_B.weight.to(low.dtype))
        if self.lora_magnitude_vector is None:
            return y
        # The norm is a constant to the gradient, as in DoRA's paper (section 4.3).
        norm = (base_weight(self).float() + self.delta()).detach().norm(dim=1)
        # Near 1, where bfloat16 has steps of 0.4 to 0.8 %.
        return (y * (self.lora_magnitude_vector / norm)).to(y.dtype)

    def _dropout(self, x: Derived) -> Derived:
        return dropped(x, self.lora.dropout) if self.training and self.lora.dropout else x


class LoRALinear(_LoRA, nn.Linear):
    """A linear with adapters; its own weight keeps its name."""


class LoRANF4Linear(_LoRA, NF4Linear):
    """A 4-bit linear with adapters: QLoRA."""


_ADAPTED: dict[type[nn.Module], type[_LoRA]] = {nn.Linear: LoRALinear, NF4Linear: LoRANF4Linear}


def base_weight(module: nn.Module) -> Tensor:
    """Return the full-precision weight [out, in] of a linear, even if quantized or sharded."""
    if isinstance(module, NF4Linear):
        return module.dequantize()
    assert isinstance(module.weight, Tensor)
    weight = whole(module.weight)
    return weight.dequantize() if is_quantized(weight) else weight


def apply_lora(model: nn.Module, lora: LoRAConfig, only: Collection[str] | None = None) -> None:
    """Give every linear whose last name is in `lora.modules` adapters, and freeze all but adapters.

    The linears are changed in place: names of weights, hooks and devices stay.

    Args:
        only: the full names of those to change, where not all of these last names are.

    Raises:
        ConfigError: a name that no linear of the model has, an impossible rank or dropout.
    """
    check_at_least(1, {"lora_rank": lora.rank})
    if not 0 < lora.alpha < 1e30:
        raise ConfigError(f"lora_alpha is {lora.alpha}; it must be above 0, below 1e30")
    if not 0 <= lora.dropout < 1:
        raise ConfigError(f"lora_dropout is {lora.dropout}; it must be from 0 to below 1")
    linears = {name: m for name, m in model.named_modules() if type(m) in _ADAPTED}
    leaves = {name.rpartition(".")[2] for name in linears}
    _check_names(lora.modules, leaves)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    for name, linear in linears.items():
        if name.rpartition(".")[2] in lora.modules and (only is None or name in only):
            linear.__class__ = _ADAPTED[type(linear)]
            linear.add_adapter(lora)


def remove_adapters(model: nn.Module) -> None:
    """Make linears with adapters what they were before, in place; the inverse of `apply_lora`."""
    plain: dict[type[nn.Module], Any] = {adapted: kind for kind, adapted in _ADAPTED.items()}
    for _, module in list(lora_modules(model)):
        for name in ("lora", "lora_A", "lora_B", "lora_magnitude_vector"):
            delattr(module, name)
        module.__class__ = plain[type(module)]


def make_plain(model: nn.Module) -> None:
    """Make a model on the meta device one without adapters and 4-bit weights, in place."""
    remove_adapters(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Embedding):
            sizes = module.out_features, module.in_features
            model.set_submodule(name, nn.Embedding(*sizes, device="meta"))
        elif isinstance(module, NF4Linear):
            sizes = module.in_features, module.out_features
            model.set_submodule(name, nn.Linear(*sizes, bias=False, device="meta"))


def _check_names(modules: Collection[str], leaves: Collection[str]) -> None:
    if not modules:
        raise ConfigError(
            f"LoRA has no module to adapt; lora_modules can name {', '.join(sorted(leaves))}"
        )
    unknown = [f"{name!r}{did_you_mean(name, leaves)}" for name in modules if name not in leaves]
    if unknown:
        raise ConfigError(
            f"LoRA: no linear of the model is named {', '.join(unknown)}; "
            f"it has {', '.join(sorted(leaves))}"
        )


def lora_modules(model: nn.Module) -> Iterator[tuple[str, _LoRA]]:
    """Yield the name and module of every adapted linear."""
    for name, module in model.named_modules():
        if isinstance(module, _LoRA):
            yield name, module


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Initialise adapters so that the model computes what its base does: A uniform, B zero.

    Draws are full-size, float32, on the CPU and in the order of the modules, so every device and
    every number of ranks starts from the same adapters. DoRA's magnitudes need loaded base weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, module in lora_modules(model):
        bound = 1 / math.sqrt(module.in_features)
        shape = (module.lora.rank, module.in_features)
        fill(module.lora_A.weight, torch.empty(shape).uniform_(-bound, bound, generator=generator))
        module.lora_B.weight.zero_()
        if module.lora_magnitude_vector is not None:
            fill(module.lora_magnitude_vector, base_weight(module).float().norm(dim=1))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' parameters by name; empty for a model without adapters."""
    return {name: p for name, p in model.named_parameters() if is_adapter(name)}


def is_adapter(parameter_name: str) -> bool:
    """Say whether a parameter belongs to an adapter."""
    return ".lora_" in parameter_name


def adapter_config(model: nn.Module) -> dict[str, Any] | None:
    """Return the adapters' settings in PEFT's words, or None for a model without adapters.

    Raises:
        ConfigError: they differ in more than the modules that are adapted.
    """
    settings = [module.lora for _, module in lora_modules(model)]
    if not settings:
        return None
    lora = settings[0]
    if any(replace(each, modules=lora.modules) != lora for each in settings):
        raise ConfigError("adapters of different rank, alpha or kind cannot be saved as one")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(dict.fromkeys(name for each in settings for name in each.modules)),
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
        "bias": "none",
    }


def lora_config_from_peft(config: Mapping[str, Any]) -> LoRAConfig:
    """Read PEFT's `adapter_config.json`.

    Raises:
        CheckpointError: it lacks what makes a LoRA.
    """
    if missing := {"target_modules", "r", "lora_alpha"} - config.keys():
        raise CheckpointError(f"adapter_config.json lacks {', '.join(sorted(missing))}")
    rank, alpha, dropout = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0)
    numbers = (int, float)
    if (
        type(rank) is not int
        or not 0 < rank < 2**20
        or type(alpha) not in numbers
        or not abs(alpha) < 1e30
        or type(dropout) not in numbers
        or not 0 <= dropout < 1
    ):
        raise CheckpointError(
            f"adapter_config.json: r is {rank!r}, lora_alpha {alpha!r}, lora_dropout {dropout!r}; "
            "these must be a whole number above 0, a number, and one from 0 to below 1"
        )
    return LoRAConfig(
        modules=tuple(sorted(config["target_modules"])),
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        use_dora=config.get("use_dora", False),
        use_rslora=config.get("use_rslora", False),
    )


class MergedWeights(Mapping[str, Tensor]):
    """A model's plain weights by name: adapters merged, 4-bit weights dequantized, one at a time.

    A tensor is computed when it is read, so saving never holds a second model. One that is sharded
    is gathered then: all ranks must read the same names in the same order.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, Callable[[], Tensor]] = {}
        for prefix, module in model.named_modules():
            if isinstance(module, _LoRA):
                self._tensors[f"{prefix}.weight"] = module.merged_weight
            elif isinstance(module, NF4Linear):
                self._tensors[f"{prefix}.weight"] = module.dequantize
            else:
                for name, parameter in module.named_parameters(prefix, recurse=False):
                    if not is_adapter(name):
                        self._tensors[name] = partial(whole, parameter.detach())

    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return self._tensors[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
