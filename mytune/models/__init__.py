"""Model families, a file each; `auto_model` reads the sizes of a checkpoint."""

from mytune._lazy import lazy_names

_WHERE = {
    "auto_model": "auto",
    "lora_auto_model": "auto",
    "qlora_auto_model": "auto",
    "sizes_of_checkpoint": "auto",
    "lora_decoder": "builders",
}
__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
