"""Llama 3.3: the 70B of Llama 3.1 under its own name."""

from __future__ import annotations

from mytune.models.builders import builders
from mytune.models.llama3 import llama3_tokenizer as llama3_tokenizer
from mytune.models.llama3_1 import LLAMA3_1_70B

LLAMA3_3_70B = LLAMA3_1_70B

llama3_3_70b, lora_llama3_3_70b, qlora_llama3_3_70b = builders("llama3_3_70b", LLAMA3_3_70B)
