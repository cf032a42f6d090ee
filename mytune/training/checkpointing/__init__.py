"""Checkpoints: formats, reading, publishing, resuming."""

from mytune._lazy import lazy_names

_WHERE = {
    "FullModelHFCheckpointer": "checkpointers",
    "FullModelMetaCheckpointer": "checkpointers",
    "FullModelTorchTuneCheckpointer": "checkpointers",
    "Published": "resume",
    "latest": "resume",
    "optimizer_state": "optimizer",
    "load_optimizer_state": "optimizer",
    "check_adapter": "peft",
    "read_adapter": "peft",
}
__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
