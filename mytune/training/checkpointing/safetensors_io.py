"""safetensors: mapped reading through the library, and a writer that holds one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mytune.errors import CheckpointError
from mytune.training.checkpointing.files import FileRecord, TensorFile, TensorSpec, TensorWriter

# The library lays tensors out by alignment: largest first, in this order, then by name.
_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}


class SafetensorsFile(TensorFile):
    """A safetensors file.

    The library bounds the header (100 MB) and demands that the tensors cover the file exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = cast(Any, safe_open(str(path), framework="pt", device="cpu"))
            slices = {name: self._file.get_slice(name) for name in self._file.offset_keys()}
            self.specs = {
                name: TensorSpec(_DTYPES[part.get_dtype()], tuple(part.get_shape()))
                for name, part in slices.items()
            }
            self.metadata: dict[str, str] = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            again = "; download or copy it again" if isinstance(error, SafetensorError) else ""
            raise CheckpointError(
                f"{path} is not a usable safetensors file: {error}{again}"
            ) from error
        except KeyError as error:
            raise CheckpointError(f"{path} holds tensors of the unknown type {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except ValueError as error:  # what becomes of Ctrl-C in the library
            if "could not determine the shape" not in str(error):
                raise
            raise KeyboardInterrupt from error
        return tensor


class SafetensorsWriter(TensorWriter):
    """Writes the bytes that `safetensors.torch.save_file` would write."""

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, specs)
        self.file.write(_header(specs, self.order, metadata or {}))

    @staticmethod
    def order_of(specs: Mapping[str, TensorSpec]) -> list[str]:
        return sorted(specs, key=lambda name: (_RANK[specs[name].dtype], name))

    def _write(self, data: memoryview) -> None:
        self.file.write(data)


def _header(
    specs: Mapping[str, TensorSpec], order: list[str], metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        spec = specs[name]
        begin, end = end, end + spec.nbytes
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write a whole mapping; each tensor is asked for twice: for its shape, and to be written."""
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name in writer.order:
            writer.add(tensors[name])
    return writer.record
