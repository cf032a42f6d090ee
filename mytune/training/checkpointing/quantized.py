"""Quantized checkpoints: one safetensors file in torchao's layout, under Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mytune import versions
from mytune.errors import TENSORS, CheckpointError, ResourceError, first_line, shortened
from mytune.modules.decoder import Decoder, DecoderConfig
from mytune.quantization.tensors import (
    flatten,
    keys_of,
    packed_for_another_device,
    rebuild,
)
from mytune.training.checkpointing.companions import companions
from mytune.training.checkpointing.files import check_finite_weight, read_json, to_json
from mytune.training.checkpointing.formats import HF, differences, parameter_shapes
from mytune.training.checkpointing.publish import Draft, publication
from mytune.training.checkpointing.safetensors_io import SafetensorsFile

QUANTIZATION = "quantization.json"
_NAMES = "tensor_names"  # torchao's key of the list of tensors


def is_quantized_file(file: Mapping[str, Tensor]) -> bool:
    """Say whether a file of tensors is in torchao's layout."""
    return isinstance(file, SafetensorsFile) and _NAMES in file.metadata


def stored_quantizer(directory: Path) -> dict[str, Any] | None:
    """Return the config of torchao's that a directory was quantized with, as JSON."""
    file = directory / QUANTIZATION
    said = read_json(file).get("config") if file.is_file() else None
    if not isinstance(said, dict | None):
        raise CheckpointError(f"{file}: its config is {said!r}, not an object")
    return said


def read_quantized(
    files: Sequence[Mapping[str, Tensor]], config: DecoderConfig, device: torch.device
) -> dict[str, Tensor]:
    """Return a quantized model's weights by our names, over mapped memory.

    Args:
        device: where they will be used; some layouts are for one kind of device.

    Raises:
        CheckpointError: tensors that are missing, unknown, damaged, or not the model's.
        ResourceError: the weights are laid out for another device.
    """
    opened = [file for file in files if isinstance(file, SafetensorsFile)]
    where = opened[0].path.parent if len(opened) > 1 else opened[0].path
    held = {key: file for file in opened for key in file}
    weights, problems = {}, []
    for name, said in _metadata(opened):
        try:
            if (packed_for := packed_for_another_device(said, device)) is not None:
                raise ResourceError(
                    f"{where} was quantized for {packed_for} and cannot be read on {device}: "
                    "quantize again here, or with another quantizer"
                )
            keys = keys_of(name, said)
            found = {part: held.pop(key) for part, key in keys.items() if key in held}
            if found.keys() == keys.keys():
                parts = {part: _aligned(file[keys[part]]) for part, file in found.items()}
                weights[HF.table.ours(name) or name] = rebuild(said, parts)
            problems += [f"missing {keys[part]}" for part in keys.keys() - found.keys()]
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            problems.append(f"damaged {name}: {type(error).__name__}: {first_line(error)}")
    problems += [f"unexpected {key}" for key in held]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if problems := problems or differences(parameter_shapes(config), shapes):
        raise CheckpointError(
            f"{where}: {len(problems)} quantized tensors do not fit the model",
            shortened(problems, TENSORS),
        )
    return weights


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor at an address that vectors can be loaded from: a file's may be any.

    torch's kernel for 8-bit weights ends the process at others.
    """
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _metadata(files: Sequence[SafetensorsFile]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of every tensor and what the metadata says of it."""
    seen: set[str] = set()
    for file in files:
        try:
            names = json.loads(file.metadata.get(_NAMES, "[]"))
            said = {name: json.loads(file.metadata[name]) for name in names}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file.path}: its metadata is damaged: {error!r}") from error
        if not all(isinstance(each, dict) for each in said.values()):
            raise CheckpointError(f"{file.path}: its metadata is damaged: no object for a tensor")
        yield from ((name, each) for name, each in said.items() if name not in seen)
        seen |= said.keys()


def publish_quantized(
    target: Path, model: Decoder, quantizer: Mapping[str, Any], source_dir: Path
) -> None:
    """Publish a quantized model atomically, with the companions of the checkpoint it came from.

    Args:
        target: the new directory; one that is there is replaced.
        quantizer: the config of torchao's, as JSON.
        source_dir: where the unquantized weights are; nothing is written there.

    Raises:
        NumericalError: a weight or scale is not finite.
        ResourceError: the disk is full, read-only or faulty.
    """
    dtype, device = model.dtype, model.device
    what = {
        "quantizer": quantizer["_type"],
        "config": quantizer,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "versions": versions("torch", "torchao"),
    }
    facts = {"step": 0, "format": HF.name, "dtype": what["dtype"], "quantizer": what["quantizer"]}
    with publication(target.parent, target.name, facts) as draft:
        _add_weights(draft, model)
        draft.add_bytes(QUANTIZATION, to_json(what))
        for name, content in companions(source_dir, dtype):
            if name == "config.json":
                content = _with_quantizer(content, quantizer)
            draft.add_bytes(name, content)


def _add_weights(draft: Draft, model: Decoder) -> None:
    tensors: dict[str, Tensor] = {}
    metadata = {}
    for ours, parameter in model.named_parameters():
        name = HF.table.theirs(ours)
        parts, metadata[name] = flatten(name, parameter.detach())
        for part in parts.values():
            check_finite_weight(ours, part)
        tensors |= parts
    metadata[_NAMES] = json.dumps(list(metadata))
    draft.add_tensors(HF.single, tensors, metadata)


def _with_quantizer(config: bytes, quantizer: Mapping[str, Any]) -> bytes:
    """Return a config.json by which transformers and vLLM know how the weights are quantized."""
    said = {"quant_method": "torchao", "quant_type": {"default": dict(quantizer)}}
    return to_json({**json.loads(config), "quantization_config": said})
