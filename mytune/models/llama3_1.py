"""Llama 3.1: Llama 3 with scaled RoPE for 128k positions, and a 405B size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mytune.models.builders import builders
from mytune.models.llama3 import LLAMA3_8B, LLAMA3_70B, llama3_sizes
from mytune.models.llama3 import llama3_tokenizer as llama3_tokenizer
from mytune.modules.decoder import RopeScaling

LLAMA3_1_8B = replace(LLAMA3_8B, max_seq_len=131_072, rope_scaling=RopeScaling(factor=8.0))
LLAMA3_1_70B = replace(LLAMA3_70B, max_seq_len=131_072, rope_scaling=RopeScaling(factor=8.0))
LLAMA3_1_405B = replace(
    LLAMA3_1_8B, num_layers=126, num_heads=128, embed_dim=16_384, intermediate_dim=53_248
)

llama3_1_sizes = partial(llama3_sizes, scale_factor=8.0)
llama3_1, lora_llama3_1, qlora_llama3_1 = builders("llama3_1", llama3_1_sizes)
llama3_1_8b, lora_llama3_1_8b, qlora_llama3_1_8b = builders("llama3_1_8b", LLAMA3_1_8B)
llama3_1_70b, lora_llama3_1_70b, qlora_llama3_1_70b = builders("llama3_1_70b", LLAMA3_1_70B)
llama3_1_405b, lora_llama3_1_405b, qlora_llama3_1_405b = builders("llama3_1_405b", LLAMA3_1_405B)
