"""Tiny random Hugging Face models, the oracle of many tests, and what loads a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mytune.models import auto_model
from mytune.models.auto import sizes_from_hf
from mytune.modules import Decoder
from mytune.training import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
    load_for_inference,
)

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Return a random Llama in float32, eval mode, with weights large enough that a fault shows."""
    sizes = dict(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).eval()
    with torch.no_grad():  # norms start as ones, which would hide a swapped or forgotten one
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def with_adapter(model: LlamaForCausalLM, std: float, **settings: Any) -> Any:
    """Return PEFT's model over another, with an adapter large enough to change what it says."""
    import peft  # takes a while

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **settings)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return adapted


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    reader: type[FullModelHFCheckpointer | FullModelMetaCheckpointer] = FullModelHFCheckpointer,
    adapter: Path | None = None,
    **how: Any,
) -> Decoder:
    """Load a checkpoint for inference on the CPU."""
    with torch.device("meta"):
        model = auto_model(str(folder))
    checkpointer = reader(str(folder), adapter_checkpoint=adapter and str(adapter))
    return load_for_inference(model, checkpointer, torch.device("cpu"), dtype, **how)


def our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a Hugging Face Llama state dict to ours, by hand and not by the tables."""
    renames = (
        ("model.", ""),
        ("self_attn.", "attn."),
        ("post_attention_layernorm", "mlp_norm"),
        ("input_layernorm", "attn_norm"),
    )
    renamed = {}
    for name, tensor in state.items():
        for old, new in renames:
            name = name.replace(old, new, 1)
        renamed[name] = tensor
    return renamed


def twins(**shape: Any) -> tuple[Decoder, LlamaForCausalLM]:
    """Return our model and Hugging Face's with the same random weights."""
    theirs = tiny_llama(**shape)
    ours = Decoder(sizes_from_hf(theirs.config.to_dict())).eval()
    weights = our_names(theirs.state_dict())
    if ours.lm_head is None:
        del weights["lm_head.weight"]
    ours.load_state_dict(weights)
    return ours, theirs
