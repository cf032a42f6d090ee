"""Files: which may be read, and how bytes are written so that they are hashed and durable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch
from torch import Tensor

from mytune.errors import CheckpointError, NumericalError

_MAX_JSON_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file."""

    size: int
    sha256: str
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)


class TensorFile(Mapping[str, Tensor]):
    """A file of tensors that are read when asked for, from mapped memory.

    Writing into such a tensor changes memory only, never the file.
    """

    path: Path
    specs: Mapping[str, TensorSpec]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def read_rows(tensors: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
    """Read some rows of a tensor; what is mapped, or in pieces, is not read beyond them."""
    if isinstance(tensors, PiecewiseFiles):
        return tensors.rows(name, rows)
    tensor = tensors[name]
    return tensor if rows == slice(None) else tensor[rows]


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return a tensor's shape; it is read only where the mapping does not know."""
    if isinstance(tensors, PiecewiseFiles):
        return tensors.shape(name)
    return tuple(tensors[name].shape)


class PiecewiseFiles(Mapping[str, Tensor]):
    """Files that hold the rows of tensors one after the other, as one mapping of whole tensors."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._pieces: dict[str, list[TensorFile]] = {}
        for file in files:
            for name in file:
                self._pieces.setdefault(name, []).append(file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        shapes = [piece.specs[name].shape for piece in self._pieces[name]]
        return shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])

    def rows(self, name: str, rows: slice) -> Tensor:
        """Read rows of a tensor from the files that hold them."""
        pieces = self._pieces[name]
        if len(pieces) == 1:
            return read_rows(pieces[0], name, rows)
        lengths = [piece.specs[name].shape[0] for piece in pieces]
        start, stop, _ = rows.indices(sum(lengths))
        ends = list(accumulate(lengths))
        parts = [
            piece[name][max(start - end + length, 0) : stop - end + length]
            for piece, length, end in zip(pieces, lengths, ends, strict=True)
            if start < end and stop > end - length
        ]
        return torch.cat(parts) if parts else pieces[0][name][:0]

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, slice(None))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def inside(directory: Path, name: str) -> Path:
    """Return `directory / name` if that lies in the directory, else raise CheckpointError.

    Links are followed only within the directory, and from a snapshot of the Hugging Face cache
    to the blobs beside it (`snapshots/<revision>/config.json -> ../../blobs/<hash>`).
    """
    parts = PurePosixPath(name).parts
    wrong = not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name
    if wrong or not all(_can_be_named(part) for part in parts):
        raise CheckpointError(f"{name[:200]!r} is not the name of a file inside {directory}")
    path = directory.joinpath(*parts)
    home, real = directory.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if not (
        real.is_relative_to(home)
        or (home.parent.name == "snapshots" and real.is_relative_to(blobs))
    ):
        raise CheckpointError(
            f"{path} leads out of its directory, to {real}; "
            "give the directory that holds the file, or copy the file here"
        )
    return path


def _can_be_named(part: str) -> bool:
    try:
        return len(os.fsencode(part)) <= 255
    except UnicodeEncodeError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return a JSON object as we write it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def sha256_of(path: Path) -> str:
    """Hash a file's content as it is on the disk, not as the page cache remembers it."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Tell which file an error is about: a failed write does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class HashedFile:
    """A new file that hashes what is written; it only grows: there is no seeking."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._discarded = False
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        if self._discarded:  # a ZipFile writes its directory even when it is thrown away
            return len(data)
        self._hash.update(data)
        with _naming(self._path):
            self._file.write(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: `finish` flushes; a ZipFile asks after every member."""

    def discard(self) -> None:
        """Close a file that will not be kept; a full disk must not hide the error that led here."""
        self._discarded = True
        try:
            self._file.close()
        except OSError:
            self._file.raw.close()

    def finish(self, tensors: Mapping[str, TensorSpec] | None = None) -> FileRecord:
        """Put everything on the disk and return what the manifest says of the file."""
        with _naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return FileRecord(self.size, self._hash.hexdigest(), tensors or {})


class TensorWriter:
    """Writes a file of tensors, one at a time in `order`; `record` is there after the block."""

    record: FileRecord

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self.order = self.order_of(specs)
        self.file = HashedFile(path)
        self._written = 0

    @staticmethod
    def order_of(specs: Mapping[str, TensorSpec]) -> list[str]:
        """Return the order in which tensors stand in the file."""
        return list(specs)

    def add(self, tensor: Tensor) -> None:
        """Write the next tensor; it must be what was announced."""
        name = self.order[self._written]
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if spec != self.specs[name]:
            raise ValueError(f"{name} is {spec}, but was announced as {self.specs[name]}")
        self._write(tensor_bytes(tensor))
        self._written += 1

    def _write(self, data: memoryview) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Write what follows the last tensor."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        if error is not None:
            self.file.discard()
            return
        if self._written != len(self.order):
            raise ValueError(f"{self._written} of {len(self.order)} tensors were written")
        self._end()
        self.record = self.file.finish(self.specs)


def check_finite_weight(name: str, tensor: Tensor) -> None:
    """Raise NumericalError if a tensor of 16 bits or more, about to be saved, is not finite."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return
    # The extremes carry any NaN or Inf; torch.isfinite would need as much memory as the tensor.
    if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise NumericalError(
            f"{name} holds NaN or Inf as {tensor.dtype}; nothing was saved, and the checkpoints "
            "published before are as they were. In training lower optimizer.lr, or set "
            "clip_grad_norm"
        )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's content in row-major order; a copy only where it has to be one."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
