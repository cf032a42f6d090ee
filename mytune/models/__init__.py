"""Model families, a file each; `auto_model` reads the sizes of a checkpoint."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "auto": "auto_model lora_auto_model qlora_auto_model sizes_of_checkpoint",
        "builders": "lora_decoder",
    },
)
