"""Tensors in pieces: every rank writes the rows it holds to a file of its own in one draft."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mytune._sharded import WHOLE, Part, local, part_of
from mytune.errors import CheckpointError
from mytune.training.checkpointing.files import FileRecord, TensorFile, check_finite_weight, inside
from mytune.training.checkpointing.publish import Draft
from mytune.training.checkpointing.safetensors_io import SafetensorsFile
from mytune.training.distributed import rank


class Pieces(NamedTuple):
    """What this rank writes of some tensors: nothing if another one writes the same."""

    part: Part
    tensors: Mapping[str, Tensor]

    @property
    def is_ours(self) -> bool:
        return not self.part.is_copy and (self.part.count > 1 or rank() == 0)

    def file(self, stem: str, index: int) -> str:
        """Return the name of the file that holds piece `index`."""
        n = self.part.count
        return f"{stem}.safetensors" if n == 1 else f"{stem}-{index + 1:05d}-of-{n:05d}.safetensors"


def own_pieces(tensors: Mapping[str, Tensor], *, copy: bool = False) -> Pieces:
    """Return the rows of `tensors` that this rank writes; what is not sharded is the first's.

    Args:
        copy: into the CPU's memory, so that training can go on while they are written.
    """
    parts = {name: part_of(tensor) for name, tensor in tensors.items()}
    part = next((each for each in parts.values() if each.count > 1), WHOLE)
    pieces = Pieces(part, {})
    if not pieces.is_ours:
        return pieces
    rows = {
        name: local(tensor.detach())
        for name, tensor in tensors.items()
        if part.index == 0 or parts[name].count > 1
    }
    if copy:
        rows = {name: each.to("cpu", copy=True) for name, each in rows.items()}
    return Pieces(part, rows)


def write_pieces(draft: Draft, stem: str, pieces: Pieces, finite: bool = False) -> None:
    """Write this rank's piece; the first rank waits for the others' and puts all on record.

    Raises:
        NumericalError: a number is not finite, and all must be `finite`.
    """
    if not pieces.is_ours:
        return
    name = pieces.file(stem, pieces.part.index)
    for key, tensor in pieces.tensors.items() if finite else ():
        check_finite_weight(key, tensor)
    draft.add_tensors(name, pieces.tensors)
    if pieces.part.index > 0:
        _write_record(draft.path / name, draft.records[name])
        return
    for index in range(1, pieces.part.count):
        other = pieces.file(stem, index)
        draft.records[other] = _read_record(draft.path / other)


def _write_record(file: Path, record: FileRecord) -> None:
    """Leave beside a file what the manifest shall say of it."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps([record.size, record.sha256]))
    part.rename(file.with_suffix(".record"))


def _read_record(file: Path) -> FileRecord:
    """Wait for another rank's file; a rank that dies ends the whole run, and so the waiting."""
    record = file.with_suffix(".record")
    while not record.exists():  # over a network file system this may be some seconds old
        time.sleep(0.02)
    size, sha256 = json.loads(record.read_text())
    record.unlink()
    return FileRecord(size, sha256, SafetensorsFile(file).specs)


def open_pieces(checkpoint: Path, files: Mapping[str, object], stem: str) -> list[TensorFile]:
    """Open the pieces that a manifest's `files` name, in the order of their rows; [] if none."""
    names = [name for name in files if name.startswith((f"{stem}.", f"{stem}-"))]
    counts = {name.rpartition("-of-")[2] for name in names}
    if len(counts) > 1:
        raise CheckpointError(f"{checkpoint}: {stem} is in pieces that do not belong together")
    return [SafetensorsFile(inside(checkpoint, name)) for name in sorted(names)]
