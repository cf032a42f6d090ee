"""Sizes read from a checkpoint: `config.json` (Hugging Face) or `params.json` (Meta)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mytune.errors import CheckpointError, first_line
from mytune.models.builders import builders
from mytune.models.llama3 import ffn_dim
from mytune.modules.decoder import DecoderConfig, RopeScaling

# What a config.json may say of Llama's computation, and the only values that this decoder computes.
_COMPUTED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}


def sizes_of_checkpoint(checkpoint_dir: str) -> DecoderConfig:
    """The Llama-type model whose `config.json` or `params.json` lies in `checkpoint_dir`."""
    folder = Path(checkpoint_dir).expanduser()
    for name, read in (("config.json", sizes_from_hf), ("params.json", sizes_from_meta)):
        file = folder / name
        if not file.is_file():
            continue
        try:
            sizes = read(json.loads(file.read_text()))
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise CheckpointError(f"{file} does not describe a Llama model: {why}") from error
        if wrong := _implausible(sizes):
            raise CheckpointError(f"{file} does not describe a Llama model: {', '.join(wrong)}")
        return sizes
    adapter = f"{folder} is an adapter: its base is checkpoint_dir, it is adapter_checkpoint"
    raise CheckpointError(
        f"{folder} has neither config.json (Hugging Face) nor params.json (Meta)",
        [adapter] if (folder / "adapter_config.json").is_file() else [],
    )


def _implausible(sizes: DecoderConfig) -> list[str]:
    """Return what no Llama model has: the file may be from anywhere."""
    scaling = sizes.rope_scaling
    numbers = {f.name: getattr(sizes, f.name) for f in fields(sizes) if f.type == "int"}
    found = [f"{k} is {n!r}" for k, n in numbers.items() if type(n) is not int or not 0 < n < 2**31]
    if not found and sizes.num_layers > 10_000:
        found.append(f"num_layers is {sizes.num_layers}")
    reals = {"norm_eps": sizes.norm_eps, "rope_base": sizes.rope_base}
    reals |= {f"rope_scaling.{k}": n for k, n in (vars(scaling) if scaling else {}).items()}
    found += [
        f"{k} is {n!r}"
        for k, n in reals.items()
        if type(n) not in (int, float) or not 0 < n < 2**53
    ]
    if not found and scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        found.append("rope_scaling.high_freq_factor is not above low_freq_factor")
    if type(sizes.tie_word_embeddings) is not bool:
        found.append(f"tie_word_embeddings is {sizes.tie_word_embeddings!r}")
    return found


def sizes_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face Llama `config.json`.

    Raises:
        CheckpointError: it describes a computation that the decoder does not do.
    """
    odd = [
        f"{key} is {config[key]!r}, not {value!r}"
        for key, value in _COMPUTED.items()
        if config.get(key, value) != value
    ]
    if odd:
        raise CheckpointError("config.json: not a model that mytune can build", odd)
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_seq_len=config.get("max_position_embeddings", 2048),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_base=rope.get("rope_theta") or config.get("rope_theta", 10_000.0),
        rope_scaling=_rope_scaling(rope),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"config.json: RoPE scaling {kind!r} is not 'default' or 'llama3'")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        old_context_len=rope["original_max_position_embeddings"],
    )


def sizes_from_meta(params: Mapping[str, Any]) -> DecoderConfig:
    """Read Meta's `params.json`.

    It does not say the positions: 8192, scaled 131,072; nor what Llama 3.2's small models differ
    in from 3.1's: a larger RoPE factor, and a head that is the embedding.
    """
    dim, heads = params["dim"], params["n_heads"]
    scaled = params.get("use_scaled_rope", False)
    small = scaled and dim < 4096
    factor = params.get("rope_scaling_factor") or (32.0 if small else 8.0)
    return DecoderConfig(
        vocab_size=params["vocab_size"],
        num_layers=params["n_layers"],
        num_heads=heads,
        num_kv_heads=params.get("n_kv_heads") or heads,
        embed_dim=dim,
        intermediate_dim=ffn_dim(
            dim, params.get("multiple_of", 256), params.get("ffn_dim_multiplier") or 1.0
        ),
        head_dim=dim // heads,
        max_seq_len=131_072 if scaled else 8192,
        norm_eps=params.get("norm_eps", 1e-5),
        rope_base=params.get("rope_theta", 10_000.0),
        rope_scaling=RopeScaling(factor) if scaled else None,
        tie_word_embeddings=small,
    )


auto_model, lora_auto_model, qlora_auto_model = builders("auto_model", sizes_of_checkpoint)
