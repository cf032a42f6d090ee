"""KV cache, sampling, the decoding loop, and linears laid out for decoding."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "decoding": "Decoding PromptCache Row check_prompt generate generate_batch",
        "kv_cache": "KVCache",
        "packing": "COMPILES can_compile pack_linears",
        "sampling": "Sampling check_sampling sample",
        "text": "Completion TextStream complete stop_ids",
    },
)
