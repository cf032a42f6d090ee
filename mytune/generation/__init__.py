"""KV cache, sampling, the decoding loop, and linears packed for decoding on a CPU."""

from mytune.generation.generate import check_prompt, generate
from mytune.generation.kv_cache import KVCache
from mytune.generation.packing import pack_linears
from mytune.generation.sampling import check_sampling, sample

__all__ = ["KVCache", "check_prompt", "check_sampling", "generate", "pack_linears", "sample"]
