"""The decoder and its parts, LoRA, and losses."""

from mytune._lazy import lazy_names

_WHERE = {
    "Decoder": "decoder",
    "DecoderConfig": "decoder",
    "RopeScaling": "decoder",
    "LoRAConfig": "lora",
    "LoRALinear": "lora",
    "MergedWeights": "lora",
    "adapter_config": "lora",
    "adapter_state": "lora",
    "apply_lora": "lora",
    "init_adapters": "lora",
    "lora_config_from_peft": "lora",
    "LinearCrossEntropyLoss": "loss",
    "linear_cross_entropy": "loss",
    "target_index": "loss",
    "document_mask": "masks",
    "packed_mask": "masks",
}
__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
