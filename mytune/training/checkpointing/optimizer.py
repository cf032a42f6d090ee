"""An optimizer's state as tensors and JSON, keyed by parameter names, for any torch optimizer.

torch's `load_state_dict` casts float32 state to a bfloat16 parameter's type; this keeps every bit.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mytune._sharded import own_rows, sharded_as
from mytune.errors import CheckpointError, ConfigError
from mytune.training.checkpointing.files import read_rows, shape_of

log = logging.getLogger("mytune")

# How a step is computed, not what: these stay as the config of the resumed run has them.
_IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}
_PLAIN = (type(None), bool, int, float, str)
# What these optimizers keep for each number of a parameter. Their kernels believe that it has the
# parameter's shape.
_KNOWN = ("torch.optim.", "torchao.optim.", "bitsandbytes.optim.")
_SHAPED = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_inf", "state1", "state2"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "ax", "prev", "step_size"),
)


def optimizer_state(
    model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, JSON) that `load_optimizer_state` restores bit for bit.

    Tensors are the optimizer's own, not copies; sharded ones (DTensor) are returned sharded.

    Raises:
        ConfigError: the optimizer keeps something that cannot be stored.
    """
    owned = _owned(model, optimizer)
    names = {parameter: name for name, (parameter, _) in owned.items()}
    tensors: dict[str, Tensor] = {}
    groups = [
        {
            "params": [names[parameter] for parameter in group["params"]],
            "settings": {
                key: _encode(value, f"optimizer/group{i}/{key}", tensors)
                for key, value in group.items()
                if key not in _IMPLEMENTATION
            },
        }
        for i, group in enumerate(optimizer.param_groups)
    ]
    state = {
        name: _encode(states[parameter], f"optimizer/{name}", tensors)
        for name, (parameter, states) in owned.items()
        if parameter in states
    }
    defaults = {
        key: _encode(value, f"optimizer/defaults/{key}", tensors)
        for key, value in _given(optimizer).items()
        if key not in _IMPLEMENTATION
    }
    kind = _class_name(optimizer)
    return tensors, {"class": kind, "defaults": defaults, "groups": groups, "state": state}


def load_optimizer_state(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], said: Mapping[str, Any]
) -> None:
    """Put a saved state into a fresh optimizer over the same parameters.

    Raises:
        CheckpointError: it was saved by another optimizer, or for other parameters, or is damaged.
    """
    owned = _owned(model, optimizer)
    names = {parameter: name for name, (parameter, _) in owned.items()}
    own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    _check_same_optimizer(own, optimizer, said)

    def decode(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: _decode(v, lambda path: tensors[path].clone()) for key, v in values.items()}

    for group, saved in zip(optimizer.param_groups, said["groups"], strict=True):
        try:
            then, now = decode(said.get("defaults", {})), _given(optimizer)
            _take_settings(group, decode(saved["settings"]), then, now)
            for name in set(saved["params"]) & said["state"].keys():
                parameter, states = owned[name]
                states[parameter] = {
                    key: _decode(value, _reader(tensors, parameter, key, group, optimizer))
                    for key, value in said["state"][name].items()
                }
                _check_state_shapes(name, parameter, states[parameter], optimizer)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the optimizer's state is damaged: {type(error).__name__}: {error}"
            ) from error


def _check_state_shapes(
    name: str, parameter: Tensor, state: Mapping[str, Any], optimizer: Optimizer
) -> None:
    if not _class_name(optimizer).startswith(_KNOWN):
        return
    usual = parameter.shape
    shapes = {"step": [torch.Size()]} | {key: [usual] for key in _SHAPED}
    shapes["state1"].append(torch.Size([2, *usual]))  # two moments in one: bitsandbytes' AdEMAMix
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape not in shapes.get(key, [value.shape]):
            raise CheckpointError(
                f"the optimizer's {key} of {name} has the shape {list(value.shape)}; "
                f"{list(shapes[key][0])} is expected: the checkpoint is damaged"
            )


def _owned(
    model: nn.Module, optimizer: Any
) -> dict[str, tuple[Tensor, MutableMapping[Tensor, Any]]]:
    """Return what is optimized under each name, and where its state is kept.

    torchao's CPUOffloadOptimizer optimizes twins on the CPU, each with an optimizer of its own.
    """
    twins = getattr(optimizer, "param_d2h_map", {})
    rest = getattr(optimizer, "d_opt", optimizer)
    return {
        name: (twins[p], optimizer.optim_dict[p].state)
        if p in twins
        else (p, rest.state if rest else {})
        for name, p in model.named_parameters()
    }


def _given(optimizer: Any) -> dict[str, Any]:
    """Return what the config gave an optimizer; torchao's CPUOffloadOptimizer gave it to others."""
    inner = [*getattr(optimizer, "optim_dict", {}).values(), getattr(optimizer, "d_opt", None)]
    found: dict[str, Any] = next(o.defaults for o in (*inner, optimizer) if hasattr(o, "defaults"))
    return found


def _take_settings(
    group: dict[str, Any],
    saved: Mapping[str, Any],
    then: Mapping[str, Any],
    now: Mapping[str, Any],
) -> None:
    """Take a group's saved settings, but what the config has changed since: that wins.

    Some optimizers, and schedules, keep numbers among them that change from step to step: of what
    all groups were given alike it is known whether the config has changed it.

    Args:
        then, now: what all groups were given, and are.
    """
    fresh = {key: value for key, value in group.items() if key in saved and key != "params"}
    group.update(saved)
    for key, value in fresh.items():
        was = saved.get("initial_lr", saved[key]) if key == "lr" else saved[key]
        if key in now and now[key] == value:
            was = then.get(key, was)
        if was == value:
            continue
        values = [v.item() if isinstance(v, Tensor) else v for v in (was, value)]
        log.warning("optimizer.%s was %s in the checkpoint and is %s now", key, *values)
        group[key] = value
        if key == "lr" and "initial_lr" in saved:
            group["initial_lr"] = value


def _check_same_optimizer(
    own: list[list[str]], optimizer: Optimizer, said: Mapping[str, Any]
) -> None:
    if said["class"] != _class_name(optimizer):
        raise CheckpointError(
            f"the checkpoint's optimizer state is of {said['class']}, the config's optimizer is "
            f"{_class_name(optimizer)}; set optimizer._component_ to what the run began with"
        )
    theirs = [group["params"] for group in said["groups"]]
    if own != theirs:
        ours, saved = ({n for group in groups for n in group} for groups in (own, theirs))
        raise CheckpointError(
            "the checkpoint's optimizer state is of other parameters, or of other groups of them",
            [f"only in the model: {name}" for name in sorted(ours - saved)]
            + [f"only in the checkpoint: {name}" for name in sorted(saved - ours)],
        )


Reader = Callable[[str], Tensor]


def _reader(
    tensors: Mapping[str, Tensor],
    parameter: Tensor,
    key: str,
    group: Mapping[str, Any],
    optimizer: Any = None,
) -> Reader:
    """Return what reads a saved tensor to where the optimizer wants it, sharded as its parameter.

    The copy lets go of the checkpoint's file. Step counters live on the CPU unless the
    implementation needs them on the device; bitsandbytes' paged states in memory that it makes.
    """
    on_device = key != "step" or group.get("capturable") or group.get("fused")
    device = parameter.device if on_device else torch.device("cpu")

    def read(path: str) -> Tensor:
        if isinstance(parameter, DTensor) and shape_of(tensors, path) == parameter.shape:
            rows = read_rows(tensors, path, own_rows(parameter))
            return sharded_as(parameter, rows.to(device, copy=True))
        tensor = tensors[path]
        if getattr(optimizer, "is_paged", False) and key in ("state1", "state2"):
            paged: Tensor = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)
            return paged.copy_(tensor)
        return tensor.to(device, copy=True)

    return read


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON; tensors go to `tensors` under their path."""
    if isinstance(value, _PLAIN):
        return value
    if type(value) in (Tensor, nn.Parameter, DTensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, Mapping):
        return {str(key): _encode(v, f"{path}/{key}", tensors) for key, v in value.items()}
    if isinstance(value, Tensor) and type(value).__module__.startswith("torchao."):
        names, attributes = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: _encode(getattr(value, name), f"{path}/{name}", tensors) for name in names}
        return {
            "class": _class_name(value),
            "parts": parts,
            "attributes": _encode(attributes, path, tensors),
        }
    raise ConfigError(
        f"optimizer: {path} is a {type(value).__name__}, which a checkpoint cannot hold; "
        "use an optimizer of torch.optim, bitsandbytes.optim or torchao.optim"
    )


def _decode(value: Any, read: Reader) -> Any:
    """The inverse of `_encode`."""
    if not isinstance(value, Mapping):
        return value
    match value:
        case {"tensor": str(path), **rest} if not rest:
            return read(path)
        case {"dtype": str(name), **rest} if not rest:
            return torch.empty(0, dtype=getattr(torch, name)).dtype
        case {"list": list(items), **rest} if not rest:
            return [_decode(item, read) for item in items]
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_decode(item, read) for item in items)
        case {"class": name, "parts": parts, "attributes": attributes}:
            return _tensor_class(name).__tensor_unflatten__(  # type: ignore[attr-defined]
                {key: _decode(part, read) for key, part in parts.items()},
                _decode(attributes, read),
            )
    return {key: _decode(item, read) for key, item in value.items()}


def _tensor_class(name: str) -> type[Tensor]:
    """Return a tensor subclass of torchao; a checkpoint may name nothing else."""
    module, _, attribute = name.rpartition(".")
    found = (
        getattr(importlib.import_module(module), attribute)
        if module.startswith("torchao.")
        else None
    )
    if not (isinstance(found, type) and issubclass(found, Tensor)):
        raise CheckpointError(
            f"the checkpoint's optimizer state names {name!r}: not a tensor of torchao"
        )
    return found
