"""What all peers load: a random Llama in Hugging Face's format, and rows as long as Alpaca's."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes under the names of mytune's and torchtune's generic Llama 3 builders."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int = 2048

    def arguments(self) -> dict[str, int]:
        return asdict(self)


SHAPES = {
    # Llama 3's vocabulary: the head does most of the work.
    "wide": Shape(128_256, 4, 4, 2, 256, 1024),
    # A vocabulary in proportion, as in the 8B model: the blocks do most of it.
    "deep": Shape(8_192, 8, 8, 4, 512, 1536),
}

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # of configs, and of torch


def write_model(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write a random model's `config.json` and `model.safetensors`, bfloat16 as Llama 3's are."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed_dim,
        intermediate_size=shape.intermediate_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_seq_len,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        initializer_range=0.06,  # small weights would hide a fault
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def write_rows(path: Path, count: int, vocab_size: int, seed: int = 0) -> None:
    """Write rows of random ids, trained on from the first one, as Alpaca's recipes do.

    Lengths are log-normal, of median 120 and mean 135 tokens, between 40 and 512.
    """
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            length = min(512, max(40, int(draw.lognormvariate(4.79, 0.5))))
            tokens = [draw.randrange(3, vocab_size) for _ in range(length)]
            file.write(json.dumps({"tokens": tokens, "trained_from": 0}) + "\n")
