"""Llama 3.2's text models: small, with tied embeddings and RoPE scaled by 32."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mytune.models.builders import builders
from mytune.models.llama3 import llama3_sizes
from mytune.models.llama3 import llama3_tokenizer as llama3_tokenizer
from mytune.models.llama3_1 import LLAMA3_1_8B
from mytune.modules.decoder import RopeScaling

LLAMA3_2_1B = replace(
    LLAMA3_1_8B,
    num_layers=16,
    embed_dim=2048,
    intermediate_dim=8192,
    head_dim=64,
    rope_scaling=RopeScaling(factor=32.0),
    tie_word_embeddings=True,
)
LLAMA3_2_3B = replace(LLAMA3_2_1B, num_layers=28, num_heads=24, embed_dim=3072, head_dim=128)

llama3_2_sizes = partial(llama3_sizes, scale_factor=32.0, tie_word_embeddings=True)
llama3_2, lora_llama3_2, qlora_llama3_2 = builders("llama3_2", llama3_2_sizes)
llama3_2_1b, lora_llama3_2_1b, qlora_llama3_2_1b = builders("llama3_2_1b", LLAMA3_2_1B)
llama3_2_3b, lora_llama3_2_3b, qlora_llama3_2_3b = builders("llama3_2_3b", LLAMA3_2_3B)
