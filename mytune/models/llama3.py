"""Llama 3: sizes, generic builder, tokenizer. https://arxiv.org/abs/2407.21783"""

from __future__ import annotations

from dataclasses import replace

from mytune.models.builders import builders
from mytune.modules.decoder import DecoderConfig, RopeScaling
from mytune.tokenizers.llama3 import Llama3Tokenizer as Llama3Tokenizer
from mytune.tokenizers.llama3 import llama3_tokenizer as llama3_tokenizer

LLAMA3_8B = DecoderConfig(
    vocab_size=128_256,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    embed_dim=4096,
    intermediate_dim=14_336,
    head_dim=128,
    max_seq_len=8192,
)
LLAMA3_70B = replace(
    LLAMA3_8B, num_layers=80, num_heads=64, embed_dim=8192, intermediate_dim=28_672
)


def ffn_dim(embed_dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """Return Llama's width of the MLP: two thirds of 4 * embed_dim, times a factor, rounded up."""
    hidden = int(multiplier * int(8 * embed_dim / 3))
    return -(-hidden // multiple_of) * multiple_of


def llama3_sizes(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    attn_dropout: float = 0.0,
    rope_base: float = 500_000,
    intermediate_dim: int | None = None,
    norm_eps: float = 1e-5,
    scale_factor: float | None = None,
    tie_word_embeddings: bool = False,
) -> DecoderConfig:
    """A Llama of the sizes given; `scale_factor` stretches RoPE as Llama 3.1 does."""
    return DecoderConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim or ffn_dim(embed_dim),
        head_dim=embed_dim // num_heads,
        max_seq_len=max_seq_len,
        norm_eps=norm_eps,
        rope_base=rope_base,
        attn_dropout=attn_dropout,
        rope_scaling=RopeScaling(scale_factor) if scale_factor else None,
        tie_word_embeddings=tie_word_embeddings,
    )


llama3, lora_llama3, qlora_llama3 = builders("llama3", llama3_sizes)
llama3_8b, lora_llama3_8b, qlora_llama3_8b = builders("llama3_8b", LLAMA3_8B)
llama3_70b, lora_llama3_70b, qlora_llama3_70b = builders("llama3_70b", LLAMA3_70B)
