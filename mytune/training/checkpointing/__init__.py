"""Checkpoints: formats, reading, publishing, resuming."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "checkpointers": (
            "FullModelHFCheckpointer FullModelMetaCheckpointer FullModelTorchTuneCheckpointer"
        ),
        "resume": "Published latest",
        "optimizer": "optimizer_state load_optimizer_state",
    },
)
