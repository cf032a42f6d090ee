"""The decoder and its parts, LoRA, and losses."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "decoder": "Decoder DecoderConfig RopeScaling",
        "lora": (
            "LoRAConfig LoRALinear MergedWeights adapter_config adapter_state apply_lora "
            "init_adapters lora_config_from_peft make_plain remove_adapters"
        ),
        "loss": "LinearCrossEntropyLoss linear_cross_entropy target_index trained_hidden",
        "masks": "document_mask packed_mask",
    },
)
