"""Optimizers: tried before a weight is read, and stepped in the backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mytune.config import instantiate
from mytune.errors import ConfigError, TuneError
from mytune.training.distributed import world_size
from mytune.training.grad import by_mesh, piece_norms, total_norm


def check_optimizer(component: Mapping[str, Any], device: torch.device) -> None:
    """Try an optimizer on one small parameter, as its package or the device may not allow it.

    Raises:
        ConfigError: it cannot be built, does not step on this device, or asks for a closure.
    """
    name = component["_component_"]
    parameter = nn.Parameter(torch.zeros(64, 64, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer = instantiate(component, [parameter])
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"optimizer: {name} asks for a closure at each step, which this recipe does not "
                "have; use one that steps once, such as torch.optim.AdamW"
            )
        if not type(optimizer).__module__.startswith("torchao."):  # those compile their step
            optimizer.step()
    except TuneError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        usual = "torch.optim.AdamW"
        other = "" if name == usual else f", or use another, such as {usual}"
        raise ConfigError(
            f"optimizer: {name} does not work so on {device}: {why}; change its arguments{other}"
        ) from error


def check_step_in_backward(
    component: Mapping[str, Any],
    enabled: bool,
    gradient_accumulation_steps: int,
    clip_grad_norm: float | None,
) -> None:
    """Refuse what needs whole gradients where the optimizer takes each as soon as it is there.

    That is with `optimizer_in_bwd`, and with torchao's CPUOffloadOptimizer, which copies gradients
    to the CPU during the backward pass.

    Raises:
        ConfigError: all reasons at once.
    """
    offloads = component["_component_"].endswith(".CPUOffloadOptimizer")
    if not enabled and not offloads:
        return
    who = "optimizer_in_bwd" if enabled else "torchao's CPUOffloadOptimizer"
    problems = {
        f"gradient_accumulation_steps is {gradient_accumulation_steps}: the sum would come too "
        "late; set 1 and a larger batch_size": enabled and gradient_accumulation_steps > 1,
        f"clip_grad_norm is {clip_grad_norm}: the norm is known when all gradients have been "
        "used; set null": clip_grad_norm is not None,
        "optimizer is CPUOffloadOptimizer, which has a way of its own; leave out one of the two": (
            enabled and offloads
        ),
        "optimizer.offload_gradients is true: grad_norm could not be told; leave it out": (
            offloads and component.get("offload_gradients", False)
        ),
    }
    if found := [problem for problem, is_one in problems.items() if is_one]:
        raise ConfigError(f"{who} takes gradients during the backward pass, but", found)


def check_sharding(component: Mapping[str, Any], ranks: int, in_backward: bool) -> None:
    """Raise ConfigError for an optimizer that cannot step weights as ranks hold them.

    Args:
        ranks: how many share each weight; 1 if every rank holds all of them.
        in_backward: whether it steps in the backward pass.
    """
    name = component["_component_"]
    if ranks > 1 and name.startswith(("bitsandbytes.", "torchao.")):
        raise ConfigError(
            f"optimizer is {name}, which does not step weights that {ranks} ranks share; use "
            "torch.optim.AdamW, or data_parallel_shard_dim=1 where the model fits on each device"
        )
    if ranks == 1 < world_size() and in_backward:
        raise ConfigError(
            f"optimizer_in_bwd is true, but {world_size()} ranks hold the same weights, whose "
            "gradients are summed after the backward pass; set optimizer_in_bwd=false, or shard"
        )


class StepInBackward:
    """Steps an optimizer one parameter at a time, in the backward pass, and frees each gradient.

    The optimizer stays one object, with the state, groups and schedule it would have without. Its
    own `step()` then finds no gradients and does nothing. A gradient that is not finite is applied
    to the weights in memory; it shows in the norm, which ends the run before anything is saved.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._norms: dict[Tensor, Tensor] = {}
        self._order = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._step, group))

    def _step(self, group: dict[str, Any], parameter: Tensor) -> None:
        self._norms[parameter] = piece_norms([parameter])
        groups, parameters = self._optimizer.param_groups, group["params"]
        self._optimizer.param_groups = [group]
        group["params"] = [parameter]
        try:
            self._optimizer.step()
        finally:
            group["params"] = parameters
            self._optimizer.param_groups = groups
        parameter.grad = None

    def grad_norm(self) -> Tensor:
        """Return the norm of all gradients since the last call, as `clip_grad_norm` would have."""
        groups = by_mesh(p for p in self._order if p in self._norms)
        parts = [(group[0], torch.cat([self._norms[p] for p in group])) for group in groups]
        self._norms.clear()
        return total_norm(parts)
