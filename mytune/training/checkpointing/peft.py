"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mytune.errors import TENSORS, CheckpointError, shortened
from mytune.training.checkpointing.files import check_finite_weight, inside, read_json, to_json
from mytune.training.checkpointing.formats import PEFT, differences
from mytune.training.checkpointing.publish import MANIFEST, Draft
from mytune.training.checkpointing.source import ADAPTER, open_tensors

WEIGHTS = "adapter_model.safetensors"
_FROZEN = "base_model.model.lm_head.base_layer.weight"  # PEFT saves it where the head is adapted
# Settings that change what an adapter computes, and their only values that mytune can do.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_dora": (False, True, None),
    "use_rslora": (False, True, None),
    # PEFT changes the base model for others than these when it loads the adapter.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}

Adapter = tuple[dict[str, Tensor], dict[str, Any]]


def write_adapter(
    draft: Draft, adapter: Mapping[str, Tensor], config: Mapping[str, Any], base_model: str
) -> None:
    """Write `adapter/` into a draft.

    Args:
        adapter: our names -> tensors, written in their own type.
        config: the fields of PEFT's LoraConfig.
        base_model: a repository or directory for `base_model_name_or_path`.
    """
    for name, tensor in adapter.items():
        check_finite_weight(name, tensor)
    said = {**config, "base_model_name_or_path": base_model, "inference_mode": True}
    draft.add_bytes(f"adapter/{ADAPTER}", to_json(said))
    named = {PEFT.theirs(name): tensor for name, tensor in adapter.items()}
    draft.add_tensors(f"adapter/{WEIGHTS}", named)


def read_adapter(path: Path) -> Adapter:
    """Read a PEFT directory (or its weight file) into our names and its settings.

    A checkpoint has it in `adapter`.

    `target_modules` is told by the tensors, since PEFT also allows a pattern there.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / ADAPTER).is_file() and (folder / "adapter" / ADAPTER).is_file():
        return read_adapter(folder / "adapter")
    found = [f for f in (WEIGHTS, "adapter_model.bin") if (folder / f).is_file()]
    if not (folder / ADAPTER).is_file() or not found:
        raise CheckpointError(f"{folder} is not a PEFT adapter: it needs {ADAPTER} and {WEIGHTS}")
    if path.name == "adapter_model.pt":
        raise CheckpointError(
            f"{path} is in torchtune's own format; {found[0]} beside it holds the same: name the "
            f"folder, checkpointer.adapter_checkpoint={folder}"
        )
    config = read_json(inside(folder, ADAPTER))
    odd = [
        f"{key} is {config[key]!r}, not {fine[0]!r}"
        for key, fine in _PLAIN.items()
        if key in config and config[key] not in fine
    ]
    file = open_tensors(inside(folder, found[0] if path.is_dir() else path.name))
    names = {theirs: PEFT.ours(theirs) for theirs in file if theirs != _FROZEN}
    odd += [
        f"unexpected {theirs}: found {file.specs[theirs]}" for theirs, o in names.items() if not o
    ]
    if odd:
        raise CheckpointError(f"{folder}: mytune has no such adapter", odd)
    state = {ours: file[theirs] for theirs, ours in names.items() if ours}
    modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in state})
    return state, {**config, "target_modules": modules}


def check_adapter(adapter: Adapter, expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless an adapter has the names and shapes of the model's own."""
    tensors, config = adapter
    problems = differences(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: tensor.shape for name, tensor in tensors.items()},
    )
    if problems:
        raise CheckpointError(
            f"the adapter does not fit the model: {len(problems)} of its tensors differ; it was "
            f"trained with model.lora_rank={config.get('r')} model.lora_alpha="
            f"{config.get('lora_alpha')} 'model.lora_modules="
            f"[{','.join(config.get('target_modules', ()))}]', on a base of the same sizes",
            shortened(problems, TENSORS),
        )


def base_model_name(source: Path) -> str:
    """Return what PEFT loads below the adapter: the repository if it is known, or the directory."""
    home = source.parent if source.name == "original" else source
    if (home / MANIFEST).is_file():  # a run's own weights, whatever they began as
        return str(home.resolve())
    for file, key in (("original_repo_id.json", "repo_id"), ("config.json", "_name_or_path")):
        if (home / file).is_file():
            name = read_json(inside(home, file)).get(key)
            if isinstance(name, str) and name:
                return name
    return str(home.resolve())
