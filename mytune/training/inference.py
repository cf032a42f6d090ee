"""Loading a model to use it: base weights, merged or quantized ones, or a base and an adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mytune.errors import ConfigError
from mytune.modules.decoder import Decoder
from mytune.modules.lora import (
    MergedWeights,
    adapter_state,
    apply_lora,
    lora_config_from_peft,
    remove_adapters,
)
from mytune.quantization.nf4 import NF4Linear
from mytune.quantization.quantizers import (
    check_quantizer,
    describe_config,
    quantize_linears,
    torchao_config,
)
from mytune.training.checkpointing.quantized import stored_quantizer
from mytune.training.prepare import load_adapters, load_weights

log = logging.getLogger("mytune")


def load_for_inference(
    model: Decoder,
    checkpointer: Any,
    device: torch.device,
    dtype: torch.dtype,
    merge_adapter: bool = True,
    quantizer: Any = None,
) -> Decoder:
    """Fill a model on the meta device with weights, and with the adapter if there is one.

    A quantized checkpoint keeps the dtype that it was quantized in, whatever `dtype` is.

    Args:
        merge_adapter: merge an adapter into the weights, on the CPU and one by one, unless those
            are in 4 bits or quantized; if False, it stays beside them.
        quantizer: quantize the loaded linears, a merged adapter among them.

    Returns:
        The model in eval mode, which need not be the one given.

    Raises:
        ConfigError: a model with adapters and nothing to load into them.
        CheckpointError: weights or adapters that do not fit the model.
        ResourceError: the device cannot use the quantizer, or what the checkpoint was made with.
    """
    adapter = checkpointer.adapter_weights()
    if adapter is None and adapter_state(model):
        raise ConfigError(
            "model has adapters, but there are none to load: name one in "
            "checkpointer.adapter_checkpoint, or use the builder without lora_ or qlora_"
        )
    if adapter is not None and not adapter_state(model):
        adapted = {name.partition(".lora_")[0] for name in adapter[0]}  # maybe not of all blocks
        apply_lora(model, lora_config_from_peft(adapter[1]), adapted)
    has_nf4 = any(isinstance(m, NF4Linear) for m in model.modules())
    stored = checkpointer.quantized_weights(model.config, device)
    if stored is not None:
        _check_stored(checkpointer, quantizer, device, has_nf4)
        quantizer, dtype = None, _dtype_of(stored["embed_tokens.weight"], dtype)
        model.requires_grad_(False)
    elif quantizer is not None:
        check_quantizer(quantizer, model, device, dtype)
    fill = load_weights if quantizer is None else partial(_load_quantized, quantizer=quantizer)
    weights = checkpointer.weights(model.config) if stored is None else stored
    if adapter is not None and merge_adapter and not has_nf4 and stored is None:
        cpu, plain = torch.device("cpu"), deepcopy(model)
        remove_adapters(plain)
        load_weights(model, weights, cpu, dtype)
        load_adapters(model, adapter, cpu, seed=0)
        weights, adapter, model = MergedWeights(model), None, plain
    fill(model, weights, device, dtype)
    load_adapters(model, adapter, device, seed=0)
    return model.eval()


def _check_stored(checkpointer: Any, quantizer: Any, device: torch.device, has_nf4: bool) -> None:
    """Refuse to quantize what is quantized; the quantizer that it was made with may stand."""
    where = checkpointer.source_dir
    if has_nf4:
        raise ConfigError(
            f"{where} holds a quantized model, which NF4 cannot quantize again: use the builder "
            "without qlora_"
        )
    if quantizer is None:
        return
    found, asked = stored_quantizer(where), describe_config(torchao_config(quantizer, device))
    if found != asked:
        raise ConfigError(
            f"{where} is quantized already, with {(found or {}).get('_type', 'another quantizer')}:"
            " set quantizer=null, or name the unquantized checkpoint"
        )


def _dtype_of(embedding: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    if embedding.dtype is not dtype:
        own, other = (_short(each) for each in (embedding.dtype, dtype))
        told = "the model was quantized in %s and computes in it, not in %s: set dtype=%s"
        log.warning(told, own, other, own)
    return embedding.dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def _load_quantized(
    model: Decoder,
    weights: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    quantizer: Any,
) -> None:
    """Load and quantize one block after the other: at no moment is all of it unquantized."""
    left = []
    for name, part in _parts(model):
        load_weights(part, weights, device, dtype, prefix=name)
        left += [f"{name}.{linear}".rstrip(".") for linear in quantize_linears(part, quantizer)]
    if left:
        log.warning(
            "%d linears stay as they are, their inputs being no multiple of the quantizer's "
            "group: %s",
            len(left),
            ", ".join(left[:3]) + (", ..." if len(left) > 3 else ""),
        )


def _parts(model: Decoder) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{i}", block) for i, block in enumerate(child))
        else:
            yield name, child
