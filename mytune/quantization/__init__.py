"""Weights in fewer bits: NF4 for QLoRA, torchao's quantizers for inference."""

from mytune._lazy import lazy_names

_WHERE = {
    "NF4Embedding": "nf4",
    "NF4Linear": "nf4",
    "apply_nf4": "nf4",
    "dequantize_nf4": "nf4",
    "quantize_nf4": "nf4",
    "QUANTIZERS": "quantizers",
    "Float8DynActFloat8WeightQuantizer": "quantizers",
    "Float8WeightOnlyQuantizer": "quantizers",
    "Int4WeightOnlyQuantizer": "quantizers",
    "Int8DynActInt4WeightQuantizer": "quantizers",
    "Int8DynActInt8WeightQuantizer": "quantizers",
    "Int8WeightOnlyQuantizer": "quantizers",
    "Quantizer": "quantizers",
    "check_quantizer": "quantizers",
    "quantize_linears": "quantizers",
    "stored_bytes": "tensors",
}
__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
