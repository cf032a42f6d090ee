"""Tiny checkpoints, written by other people's code or by hand, never by the tables under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mytune.modules.decoder import Decoder, DecoderConfig
from tests.hf import tiny_llama

SIZES = DecoderConfig(
    vocab_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=32,
    intermediate_dim=48,
    head_dim=8,
    max_seq_len=64,
    rope_base=10_000.0,
)


def hf_model(config: DecoderConfig) -> Any:
    """A random transformers model of these sizes."""
    return tiny_llama(
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        hidden_size=config.embed_dim,
        intermediate_size=config.intermediate_dim,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_base,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def write_hf(folder: Path, config: DecoderConfig, shard: str = "1GB") -> Any:
    """Let transformers write a checkpoint; `shard` is the largest file. Returns the model."""
    model = hf_model(config)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def meta_state(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Rename and reorder a transformers state dict as Meta has it."""

    def interleaved(weight: Tensor, heads: int) -> Tensor:
        halves = weight.view(heads, 2, config.head_dim // 2, config.embed_dim)
        return halves.transpose(1, 2).reshape(-1, config.embed_dim).clone()

    own = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for i in range(config.num_layers):
        hf, meta = f"model.layers.{i}.", f"layers.{i}."
        attn, mlp = hf + "self_attn.", hf + "mlp."
        own |= {
            meta + "attention.wq.weight": interleaved(
                state[attn + "q_proj.weight"], config.num_heads
            ),
            meta + "attention.wk.weight": interleaved(
                state[attn + "k_proj.weight"], config.num_kv_heads
            ),
            meta + "attention.wv.weight": state[attn + "v_proj.weight"],
            meta + "attention.wo.weight": state[attn + "o_proj.weight"],
            meta + "feed_forward.w1.weight": state[mlp + "gate_proj.weight"],
            meta + "feed_forward.w2.weight": state[mlp + "down_proj.weight"],
            meta + "feed_forward.w3.weight": state[mlp + "up_proj.weight"],
            meta + "attention_norm.weight": state[hf + "input_layernorm.weight"],
            meta + "ffn_norm.weight": state[hf + "post_attention_layernorm.weight"],
        }
    return {name: tensor.detach().clone() for name, tensor in own.items()}


def write_meta(folder: Path, config: DecoderConfig, parts: int = 1, embedding_dim: int = 0) -> Any:
    """Write Meta's layout in `parts` files; Llama 3 cuts its embedding along 0, Llama 2 along 1."""
    model = hf_model(config)
    state = meta_state(model.state_dict(), config)
    state["rope.freqs"] = torch.arange(4.0)
    rows = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
    dims = dict.fromkeys(rows, 0) | {"wo.weight": 1, "w2.weight": 1}
    dims["tok_embeddings.weight"] = embedding_dim
    folder.mkdir(parents=True)
    for part in range(parts):
        cut = {}
        for name, tensor in state.items():
            dim = next((d for end, d in dims.items() if name.endswith(end)), None)
            cut[name] = tensor if dim is None else tensor.chunk(parts, dim)[part].clone()
        torch.save(cut, folder / f"consolidated.{part:02d}.pth")
    sizes = {"dim": config.embed_dim, "n_layers": config.num_layers, "n_heads": config.num_heads}
    (folder / "params.json").write_text(json.dumps(sizes))
    return model


def our_model(config: DecoderConfig, weights: Mapping[str, Tensor]) -> Decoder:
    """A decoder with these weights."""
    model = Decoder(config).eval()
    model.load_state_dict(dict(weights))
    return model


def torchtune_state(meta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Meta's weights as torchtune has them; it keeps their order of rows."""
    renamed = {"attention.wq": "attn.q_proj", "attention.wk": "attn.k_proj"}
    renamed |= {"attention.wv": "attn.v_proj", "attention.wo": "attn.output_proj"}
    renamed |= {"feed_forward": "mlp", "attention_norm.weight": "sa_norm.scale"}
    renamed |= {"ffn_norm.weight": "mlp_norm.scale"}
    state = {}
    for name, tensor in meta.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        state["norm.scale" if name == "norm.weight" else name] = tensor
    return state
