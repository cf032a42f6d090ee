"""Weights in fewer bits: NF4 for QLoRA, torchao's quantizers for inference."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "nf4": "NF4Embedding NF4Linear apply_nf4 dequantize_nf4 quantize_nf4",
        "quantizers": (
            "QUANTIZERS Float8DynActFloat8WeightQuantizer Float8WeightOnlyQuantizer "
            "Int4WeightOnlyQuantizer Int8DynActInt4WeightQuantizer "
            "Int8DynActInt8WeightQuantizer Int8WeightOnlyQuantizer Quantizer check_quantizer "
            "quantize_linears"
        ),
        "tensors": "stored_bytes",
    },
)
