"""Torchtune's names and ours: which component is which, and which keys mean nothing here."""

from __future__ import annotations

from typing import Any, NamedTuple

# A name that ends in a dot is a prefix; the longest one wins.
NAMES = {
    "torchtune.": "mytune.",
    "torchtune.data.": "mytune.datasets.",
    "torchtune.utils.": "mytune.training.",
    "torchtune.utils.quantization.": "mytune.quantization.",
    "torchtune.training.quantization.": "mytune.quantization.",
    # What was trained for a quantizer is quantized by it.
    "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer": (
        "mytune.quantization.Int8DynActInt4WeightQuantizer"
    ),
    "torchtune.training.quantization.Int4WeightOnlyQATQuantizer": (
        "mytune.quantization.Int4WeightOnlyQuantizer"
    ),
    "torchtune.modules.get_cosine_schedule_with_warmup": (
        "mytune.training.get_cosine_schedule_with_warmup"
    ),
    "torchtune.modules.loss.CEWithChunkedOutputLoss": "mytune.modules.loss.LinearCrossEntropyLoss",
    "torch.nn.CrossEntropyLoss": "mytune.modules.loss.LinearCrossEntropyLoss",
}


class Retired(NamedTuple):
    """A key that is accepted and ignored while its value is harmless (`None`: always), and why."""

    harmless: tuple[Any, ...] | None
    why: str


_BLOCKS = "each block is one unit of sharding, and the embedding, norm and head are another"

RETIRED = {
    "low_cpu_ram": Retired(None, "weights are always memory-mapped"),
    "custom_sharded_layers": Retired(None, _BLOCKS),
    "memory_efficient_fsdp_wrap": Retired(None, _BLOCKS),
    "fsdp": Retired(None, "torchtune 0.6 ignores it too"),
    "collate_fn": Retired(
        (None, "mytune.datasets.padded_collate_sft"), "batches are made in one way"
    ),
    "tensor_parallel_dim": Retired((1, None), "there is no tensor parallelism"),
    "tensor_parallel_plan": Retired(None, "there is no tensor parallelism"),
    "context_parallel_dim": Retired((1, None), "there is no context parallelism"),
    "context_parallel_rotate_method": Retired(None, "there is no context parallelism"),
    "enable_fp8_training": Retired((False, None), "there is no fp8 training"),
    "fp8_recipe_name": Retired(None, "there is no fp8 training"),
    "resize_token_embeddings": Retired((False, None), "the vocabulary keeps its size"),
    "quantizer": Retired((None,), "this recipe does not quantize"),
    "seed": Retired(None, "this recipe draws nothing at random"),
    "fake_quant_after_n_steps": Retired((None,), "this recipe does not quantize"),
    "early_exit_loss": Retired((None,), "there is no early exit"),
    "layer_dropout": Retired((None,), "there is no layer dropout"),
    "enable_kv_cache": Retired(None, "it changes speed, never a result"),
    "resume_from_checkpoint": Retired((False, None), "this recipe begins anew"),
    "apply_chat_template": Retired((False, None), "chat_template says it"),
    "instruct_template": Retired((None,), "prompt.user and the tokenizer's prompt_template say it"),
    "chat_format": Retired((None,), "prompt.user and the tokenizer's prompt_template say it"),
}


def our_name(name: str) -> str:
    """Return what `name`, torchtune's or ours, is called here.

    So is torchtune's with `mytune` in the place of `torchtune`.
    """
    if name.startswith("mytune."):
        name = f"torchtune.{name.removeprefix('mytune.')}"
    if name in NAMES:
        return NAMES[name]
    prefix = max((p for p in NAMES if p.endswith(".") and name.startswith(p)), key=len, default="")
    return NAMES[prefix] + name.removeprefix(prefix) if prefix else name
