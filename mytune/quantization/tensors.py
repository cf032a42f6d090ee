"""Quantized tensors as plain ones and a line of JSON: the layout torchao has for safetensors.

https://github.com/pytorch/ao/tree/main/torchao/prototype/safetensors: of `a.weight`, an Int8Tensor,
the file holds `a._weight_qdata` and `a._weight_scale`, and its metadata what else there is to know.
transformers and vLLM read the same. What torchao has no rule for is written here in its manner.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from mytune.quantization.torchao import torchao

# The classes of tensors that may be read, and the kind of device that their bytes are laid out for.
CLASSES: Mapping[str, str | None] = {
    "Int8Tensor": None,
    "Float8Tensor": None,
    "IntxUnpackedToInt8Tensor": None,
    "Int4Tensor": None,
    "Int4TilePackedTo4dTensor": "cuda",
    "Int4OpaqueTensor": "cpu",
}
_SAFETENSORS = "prototype.safetensors.safetensors_utils"
_PLAIN = "Tensor"
_PACKED_FOR = "packed_for"


def is_quantized(tensor: Tensor) -> bool:
    """Say whether a tensor is one of torchao's, made of several."""
    return hasattr(type(tensor), "tensor_data_names")


def inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that a quantized one is made of, by torchao's names."""
    kind: Any = type(tensor)
    names = [*kind.tensor_data_names, *getattr(kind, "optional_tensor_data_names", ())]
    found = {name: getattr(tensor, name) for name in names}
    return {name: inner for name, inner in found.items() if inner is not None}


def numbers_and_scale(
    tensor: Tensor, kinds: Collection[str], with_inputs: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Return the numbers [n, m] and the scale [n] of their rows that make up a tensor.

    None for one that is made up otherwise, such as with scales for groups in a row.

    Args:
        kinds: names of torchao's classes.
        with_inputs: those whose inputs are rounded, too: symmetrically, with a scale for each row;
            and not those whose inputs are left alone.
    """
    if type(tensor).__name__ not in kinds:
        return None
    if with_inputs != rounds_inputs(tensor) or (with_inputs and not _rounds_by_row(tensor)):
        return None
    inner = inner_tensors(tensor)
    zeros = inner.pop("zero_point", None)
    if inner.keys() != {"qdata", "scale"} or (zeros is not None and zeros.any()):
        return None
    numbers, scale = inner["qdata"], inner["scale"].flatten()
    return (numbers, scale) if numbers.ndim == 2 and len(scale) == len(numbers) else None


def rounds_inputs(tensor: Tensor) -> bool:
    """Say whether a product with a tensor of torchao's rounds its inputs to 8 bits, too."""
    return getattr(tensor, "act_quant_kwargs", None) is not None


def _rounds_by_row(tensor: Tensor) -> bool:
    rounding: Any = tensor.act_quant_kwargs  # type: ignore[attr-defined]
    return (
        type(rounding.granularity).__name__ == "PerRow"
        and rounding.mapping_type.name == "SYMMETRIC"
        and not rounding.reduce_range
    )


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes, quantized or not."""
    if not is_quantized(tensor):
        return tensor.nbytes
    return sum(inner.nbytes for inner in inner_tensors(tensor).values())


def key_of(name: str, inner: str) -> str:
    """Return what the part `inner` of the tensor `name` is called in a file."""
    module, _, leaf = name.rpartition(".")
    return f"{module}._{leaf}_{inner}"


def flatten(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], str]:
    """Return the plain tensors of one that may be quantized, by key, and the JSON that says how."""
    if not is_quantized(tensor):
        return {name: tensor}, json.dumps({"_type": _PLAIN})
    parts = {key_of(name, inner): part for inner, part in inner_tensors(tensor).items()}
    said = _describe(tensor)
    if layout := _layout(said["_type"], tensor.device):
        said[_PACKED_FOR] = layout
    return parts, json.dumps(said)


def _describe(tensor: Tensor) -> dict[str, Any]:
    if type(tensor).__name__ == "Int4OpaqueTensor":
        kind: Any = type(tensor)
        names = [*kind.tensor_attribute_names, *kind.optional_tensor_attribute_names]
        values = {name: getattr(tensor, name) for name in names}
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        parts = list(inner_tensors(tensor))
        return {"_type": kind.__name__, "_data": data, "_tensor_data_names": parts}
    encoder = torchao(_SAFETENSORS).TensorSubclassAttributeJSONEncoder
    said: dict[str, Any] = json.loads(json.dumps(tensor, cls=encoder))
    return said


def keys_of(name: str, said: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a file that hold a tensor, by torchao's names of its parts.

    Raises:
        ValueError: its class is none that may be read.
    """
    kind = said.get("_type")
    if kind == _PLAIN:
        return {"": name}
    if kind not in CLASSES:
        raise ValueError(f"{kind!r} is none of {', '.join(CLASSES)}")
    return {str(inner): key_of(name, str(inner)) for inner in said["_tensor_data_names"]}


def rebuild(said: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    """Put a tensor together again; the inverse of `flatten`.

    Raises:
        ValueError, TypeError, KeyError: what the JSON says is not what torchao writes.
    """
    if said["_type"] == _PLAIN:
        return parts[""]
    data = dict(said["_data"])
    _check_dtypes(data)
    if said["_type"] == "Int4OpaqueTensor":
        tensor: Tensor = torchao("prototype.quantization.int4").Int4OpaqueTensor(**parts, **data)
        return tensor
    build = torchao(_SAFETENSORS).object_from_dict
    tensor = build({"_type": said["_type"], "_data": {**data, **parts}})
    rounding = getattr(tensor, "act_quant_kwargs", None)
    if isinstance(rounding, bool | int | float | str | list | dict):
        raise ValueError(f"act_quant_kwargs is {rounding!r}")
    return tensor


def _check_dtypes(said: Any) -> None:
    """Demand that what is called a dtype is one: torchao takes any attribute of torch."""
    if isinstance(said, Mapping):
        if said.get("_type") == "torch.dtype":
            dtype = getattr(torch, str(said.get("_data")), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{said.get('_data')!r} is no dtype")
        for each in said.values():
            _check_dtypes(each)
    elif isinstance(said, list):
        for each in said:
            _check_dtypes(each)


def packed_for_another_device(said: Mapping[str, Any], device: torch.device) -> str | None:
    """Return what a tensor's bytes are laid out for, if that is not this device."""
    kind = str(said.get("_type"))
    packed_for = said.get(_PACKED_FOR, CLASSES.get(kind))
    return None if packed_for in (None, _layout(kind, device)) else str(packed_for)


def _layout(kind: str, device: torch.device) -> str | None:
    """Return the name of the layout that a class has on a device; None if it has but one."""
    if CLASSES.get(kind) is None:
        return None
    if device.type == "cpu":  # the order of 4-bit weights follows the width of its vectors
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return device.type
