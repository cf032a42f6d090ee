"""Weights in fewer bits: NF4 for QLoRA."""

from mytune._lazy import lazy_names

_WHERE = {
    "NF4Embedding": "nf4",
    "NF4Linear": "nf4",
    "apply_nf4": "nf4",
    "dequantize_nf4": "nf4",
    "quantize_nf4": "nf4",
}
__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
