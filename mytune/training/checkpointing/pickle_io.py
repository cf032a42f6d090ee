"""PyTorch's zip files (`.pth`, `.pt`, `.bin`): read without running code, written in turn."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mytune.errors import CheckpointError, first_line
from mytune.training.checkpointing.files import TensorFile, TensorSpec, TensorWriter

_MAX_PICKLE_BYTES = 64 * 2**20
_LOCAL_HEADER = 30  # bytes before a zip member's name
_ALIGNMENT = 64  # where torch.save lets tensors begin


class PickledFile(TensorFile):
    """A dict of tensors written by `torch.save`, mapped; nothing but tensors is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_zip(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds for a file that is not what it seems
            kind = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it holds {kind[1]}" if kind else first_line(error)
            if "torchao" in why:
                why += "; quantize the unquantized checkpoint again (`tune run quantize`)"
            raise CheckpointError(
                f"{path} is not a plain file of tensors, and mytune runs no code that a checkpoint "
                f"brings: {why}"
            ) from error
        self._tensors = _plain_tensors(path, content)
        self.specs = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def _check_zip(path: Path) -> None:
    """Refuse zip files whose members are compressed, overlap, or are larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        if not members:
            raise ValueError("it is empty")
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is not a file that torch.save of PyTorch 1.6 or newer wrote: {error}"
        ) from error
    ends = [*(member.header_offset for member in members[1:]), path.stat().st_size]
    for member, end in zip(members, ends, strict=True):
        begin = member.header_offset + _LOCAL_HEADER + len(member.filename.encode())
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored or begin + member.file_size > end:
            raise CheckpointError(f"{path}: zip member {member.filename!r} is not stored plainly")
        if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: its pickle has {member.file_size:,} bytes")


def _plain_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    odd = [repr(name) for name, value in content.items() if not _is_plain(name, value)]
    if odd:
        raise CheckpointError(f"{path} holds what is not a plain tensor", odd)
    return {name: tensor.detach() for name, tensor in content.items()}


def _is_plain(name: Any, value: Any) -> bool:
    """Say whether a value is a dense tensor that is no larger than the bytes behind it."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.dtype.itemsize <= value.untyped_storage().nbytes()
    )


@dataclass(frozen=True)
class _Storage:
    """Stands in the pickle for the bytes that follow in a member of their own."""

    key: int
    spec: TensorSpec


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = getattr(torch, torch.storage._dtype_to_storage_type_map()[value.spec.dtype])
        return "storage", kind, str(value.key), "cpu", torch.Size(value.spec.shape).numel()


class _Announced:
    """Pickles as the tensor that it announces."""

    def __init__(self, storage: _Storage) -> None:
        self.storage = storage

    def __reduce__(self) -> Any:
        shape = self.storage.spec.shape
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (
            self.storage,
            0,
            shape,
            stride,
            False,
            OrderedDict(),
        )


class PickledWriter(TensorWriter):
    """Writes what `torch.save` of a dict would, without holding the dict."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__(path, specs)
        self._root = path.stem
        self._zip = zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED)  # type: ignore[call-overload]
        pickled = io.BytesIO()
        announced = {n: _Announced(_Storage(i, specs[n])) for i, n in enumerate(specs)}
        _Pickler(pickled, protocol=2).dump(announced)
        self._member("data.pkl", pickled.getbuffer())
        self._member("byteorder", memoryview(b"little"))

    def _member(self, name: str, data: memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        begin = self.file.size + _LOCAL_HEADER + len(info.filename) + 4
        info.extra = struct.pack("<2sH", b"FB", -begin % _ALIGNMENT) + bytes(-begin % _ALIGNMENT)
        self._zip.writestr(info, data)  # type: ignore[arg-type]

    def _write(self, data: memoryview) -> None:
        self._member(f"data/{self._written}", data)

    def _end(self) -> None:
        self._member("version", memoryview(b"3\n"))
        self._zip.close()
