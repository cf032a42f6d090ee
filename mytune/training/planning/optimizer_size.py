"""What an optimizer keeps per parameter, measured on two small ones on the CPU."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mytune.config import Component, instantiate
from mytune.errors import ConfigError, first_line

_ROWS, _COLUMNS = 64, 1024  # larger than what 8-bit optimizers keep in 32 bits


class OptimizerSize(NamedTuple):
    """Bytes on the device: what stays from step to step, and what a step needs for itself."""

    state: int
    step: int


def optimizer_size(
    optimizer: Component, model: nn.Module, device: str = "cuda", in_backward: bool = False
) -> OptimizerSize:
    """Return what an optimizer takes for the parameters of a model that train.

    One is built for two small parameters and takes a step: the difference of their states, divided
    by that of their sizes, is the state per element. Paged and offloaded state is not on the
    device.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    name = str(optimizer["_component_"]).rpartition(".")[2]
    state = 0.0
    settings: dict[str, object] = {}
    if not name.startswith(("Paged", "CPUOffload")):
        for dtype in {p.dtype for p in trained}:
            per_element, settings = _measure(optimizer, dtype)
            state += per_element * sum(p.numel() for p in trained if p.dtype is dtype)
    # Unless it is fused, a step holds the square roots of the second moments of all parameters.
    at_once = [p.nbytes for p in trained]
    if in_backward or device == "cpu" or settings.get("foreach") is False:
        at_once = [max(at_once, default=0)]
    plain = str(optimizer["_component_"]).startswith("torch.optim.") and not settings.get("fused")
    return OptimizerSize(int(state), sum(at_once) if plain else 0)


def _measure(optimizer: Component, dtype: torch.dtype) -> tuple[float, dict[str, object]]:
    """Return bytes per element, and the optimizer's settings."""
    samples = [
        nn.Parameter(torch.zeros(rows, _COLUMNS, dtype=dtype)) for rows in (_ROWS, 3 * _ROWS)
    ]
    for sample in samples:
        sample.grad = torch.zeros_like(sample)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        built = instantiate(optimizer, samples)
        try:
            built.step()
        except (AssertionError, RuntimeError, ArithmeticError) as error:
            name = optimizer["_component_"]
            raise ConfigError(f"optimizer: {name} cannot step: {first_line(error)}") from error
    small, large = (
        sum(_nbytes(value) for value in built.state[sample].values() if isinstance(value, Tensor))
        for sample in samples
    )
    return (large - small) / (2 * _ROWS * _COLUMNS), built.defaults


def _nbytes(tensor: Tensor) -> int:
    """Return a tensor's bytes; of one made of others, such as a quantized one, theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes()
