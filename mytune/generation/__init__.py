"""KV cache, sampling, the decoding loop, and linears laid out for decoding."""

from mytune.generation.generate import (
    Decoding,
    PromptCache,
    Row,
    check_prompt,
    generate,
    generate_batch,
)
from mytune.generation.kv_cache import KVCache
from mytune.generation.packing import COMPILES, can_compile, pack_linears
from mytune.generation.sampling import Sampling, check_sampling, sample
from mytune.generation.text import Completion, TextStream, complete, stop_ids

__all__ = [
    "COMPILES",
    "Completion",
    "Decoding",
    "KVCache",
    "PromptCache",
    "Row",
    "Sampling",
    "TextStream",
    "can_compile",
    "check_prompt",
    "check_sampling",
    "complete",
    "generate",
    "generate_batch",
    "pack_linears",
    "sample",
    "stop_ids",
]
