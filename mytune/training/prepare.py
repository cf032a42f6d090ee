"""What happens to a model between its builder and its first step: compile, load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mytune._sharded import fill, local, own_rows, sharded_as, whole
from mytune.errors import CheckpointError, shortened
from mytune.modules.decoder import Decoder
from mytune.modules.lora import adapter_config, adapter_state, init_adapters, is_adapter
from mytune.quantization.nf4 import NF4Linear
from mytune.training.checkpointing.files import read_rows
from mytune.training.checkpointing.peft import Adapter, check_adapter

log = logging.getLogger("mytune")


def compile_blocks(model: Decoder) -> None:
    """Compile every block in place; blocks are alike and share their compilations."""
    for layer in model.layers:
        layer.compile()


@torch.no_grad()
def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    prefix: str = "",
) -> None:
    """Move a checkpoint's weights into a model on the meta device, one tensor at a time.

    Mapped tensors that already have the right dtype and device are assigned, not copied. 4-bit
    linears quantize their weight as it comes. Of a sharded weight a rank reads its own rows only.
    Adapters are left for `load_adapters`. `prefix`: of what part of a model the weights are.

    Raises:
        CheckpointError: the model has parameters that no checkpoint of its sizes has.
    """
    there, unknown = set(weights), []  # a mapping may read a tensor to know whether it is there
    for path, module in model.named_modules(prefix=prefix):
        if isinstance(module, NF4Linear):
            module.quantize_(weights[f"{path}.weight"], device, dtype)
            continue
        for name, parameter in list(module.named_parameters(path, recurse=False)):
            if name not in there and not is_adapter(name):
                unknown.append(name)
            elif not is_adapter(name):
                rows = read_rows(weights, name, own_rows(parameter)).to(device, dtype)
                setattr(module, name.rpartition(".")[2], _like(parameter, rows))
    if unknown:
        raise CheckpointError(
            "the model has parameters that a checkpoint of its sizes does not have: a component "
            "of yours adds them, and a checkpointer of yours must read and write them",
            shortened(unknown),
        )


@torch.no_grad()
def load_adapters(
    model: nn.Module, adapter: Adapter | None, device: torch.device, seed: int
) -> None:
    """Give a model its adapters: those of a checkpoint, or fresh ones that change nothing.

    Base weights must be loaded. Does nothing for a model without adapters.

    Raises:
        CheckpointError: the checkpoint's adapters are not the model's, by name, shape or scaling.
    """
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(prefix, recurse=False)):
            if is_adapter(name):
                shape = local(parameter).shape
                empty = torch.empty(shape, dtype=parameter.dtype, device=device)
                setattr(module, name.rpartition(".")[2], _like(parameter, empty))
    if adapter is None:
        init_adapters(model, seed)
        return
    own, (tensors, config) = adapter_state(model), adapter
    check_adapter(adapter, own)
    _check_scaling(config, adapter_config(model) or {})
    for name, tensor in tensors.items():
        fill(own[name], tensor)


def _check_scaling(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse adapters that a model would apply otherwise than the one that they were trained in."""
    keys = ("lora_alpha", "use_dora", "use_rslora")
    differ = [
        f"{key}: the adapter has {saved.get(key)!r}, the model {own[key]!r}"
        for key in keys
        if own and (saved.get(key) or False) != own[key]
    ]
    if differ:
        raise CheckpointError(
            "the adapter was trained with other settings than the model's", differ
        )


def _like(parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
    """Return this rank's rows as a Parameter that trains and is sharded as `parameter` is."""
    return nn.Parameter(sharded_as(parameter, rows), requires_grad=parameter.requires_grad)


@torch.no_grad()
def warn_of_untrained_tokens(model: Decoder, special_tokens: Mapping[str, int]) -> None:
    """Warn of special tokens that the base model never learned, and now cannot learn either.

    A base model's embeddings of the tokens of chats may be near zero; with adapters they stay so.

    Args:
        special_tokens: ids in the rows to train on, by name.
    """
    embedding = model.embed_tokens.weight
    if embedding.requires_grad or not special_tokens:
        return
    norms = whole(torch.linalg.vector_norm(embedding, dim=1, dtype=torch.float32))
    near_zero = norms[[*special_tokens.values()]] < 0.001 * norms.median()
    if names := [name for name, bad in zip(special_tokens, near_zero.tolist(), strict=True) if bad]:
        log.warning(
            "the base model never learned %s (embeddings near zero), and adapters do not train "
            "embeddings: answers may not end; take the instruct model, or train all weights",
            ", ".join(names),
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters a model has, and how many of them train.

    A 4-bit weight counts as the weights it stands for.
    """
    total = trained = 0
    for module in model.modules():
        if isinstance(module, NF4Linear):
            total += module.in_features * module.out_features
            continue
        for parameter in module.parameters(recurse=False):
            total += parameter.numel()
            trained += parameter.numel() * parameter.requires_grad
    return total, trained
