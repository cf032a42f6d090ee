"""Loading a model to use it: base weights, merged ones, or a base and an adapter."""

from __future__ import annotations

from typing import Any

import torch

from mytune.errors import ConfigError
from mytune.modules.decoder import Decoder
from mytune.modules.lora import adapter_state, apply_lora, lora_config_from_peft, merged_weights
from mytune.quantization.nf4 import NF4Linear
from mytune.training.prepare import load_adapters, load_weights


def load_for_inference(
    model: Decoder,
    checkpointer: Any,
    device: torch.device,
    dtype: torch.dtype,
    merge_adapter: bool = True,
) -> Decoder:
    """Fill a model on the meta device with weights, and with the adapter if there is one.

    Args:
        merge_adapter: merge an adapter into the weights, on the CPU and one by one, unless those
            are 4-bit; if False, it stays beside them.

    Returns:
        The model in eval mode, which need not be the one given.

    Raises:
        ConfigError: a model with adapters and nothing to load into them.
        CheckpointError: weights or adapters that do not fit the model.
    """
    adapter = checkpointer.adapter_weights()
    if adapter is None and adapter_state(model):
        raise ConfigError(
            "model has adapters, but there are none to load: name one in "
            "checkpointer.adapter_checkpoint, or use the builder without lora_ or qlora_"
        )
    if adapter is not None and not adapter_state(model):
        apply_lora(model, lora_config_from_peft(adapter[1]))
    quantized = any(isinstance(m, NF4Linear) for m in model.modules())
    merge = adapter is not None and merge_adapter and not quantized
    home = torch.device("cpu") if merge else device
    load_weights(model, checkpointer.weights(model.config), home, dtype)
    load_adapters(model, adapter, home, seed=0)
    if merge:
        with torch.device("meta"):
            plain = Decoder(model.config)
        load_weights(plain, merged_weights(model), device, dtype)
        model = plain
    return model.eval()
