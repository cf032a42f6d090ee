"""KV cache, sampling, the decoding loop, and linears packed for decoding on a CPU."""

from mytune._lazy import lazy_names

_WHERE = {
    "KVCache": "kv_cache",
    "check_prompt": "generate",
    "generate": "generate",
    "check_sampling": "sampling",
    "sample": "sampling",
    "pack_linears": "packing",
}
__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
