"""Publishing checkpoints so that the last good one is never lost: draft, rename, verify, prune.

A draft is written to `<name>.tmp-<uuid>/` and becomes `<name>/` by one rename, when everything in
it, the manifest last, is on the disk. `clean_up` finishes or removes what a killed run left.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from torch import Tensor

from mytune import versions
from mytune.errors import CheckpointError, ResourceError, TuneError
from mytune.training.checkpointing.files import (
    FileRecord,
    HashedFile,
    fsync_directory,
    inside,
    read_json,
    sha256_of,
    to_json,
)
from mytune.training.checkpointing.safetensors_io import write_safetensors
from mytune.training.distributed import from_rank_0, rank

log = logging.getLogger("mytune")

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 1
NAME = re.compile(r"(epoch|step)_\d+")
_LEFTOVER = re.compile(r"((?:epoch|step)_\d+|quantized)\.(tmp|old|del)-[0-9a-f]{32}")


class Draft:
    """A checkpoint that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, FileRecord] = {}

    def target(self, name: str) -> Path:
        """Return where a file goes; its directory exists then."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_bytes(self, name: str, data: bytes) -> None:
        """Write a small file."""
        file = HashedFile(self.target(name))
        try:
            file.write(data)
            self.records[name] = file.finish()
        except BaseException:
            file.discard()
            raise

    def add_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file, one tensor at a time."""
        self.records[name] = write_safetensors(self.target(name), tensors, metadata)


@contextmanager
def publication(output_dir: Path, name: str, facts: Mapping[str, Any]) -> Iterator[Draft]:
    """Give a draft to fill; publish it as `output_dir / name` when the block ends well.

    Args:
        facts: what the manifest says beside the files, `step` among them.

    Raises:
        ResourceError: the disk is full, read-only or faulty. Nothing published before is touched.
    """
    draft = Draft(output_dir / f"{name}.tmp-{uuid4().hex}")
    try:
        draft.path.mkdir(parents=True)
        yield draft
        draft.add_bytes(MANIFEST, to_json(_manifest(name, facts, draft.records)))
        for directory, _, _ in os.walk(draft.path, topdown=False):
            fsync_directory(Path(directory))
        _put_in_place(draft.path, output_dir / name)
    except OSError as error:
        raise ResourceError(
            f"cannot write the checkpoint {output_dir / name}: {error.strerror or error}; free "
            "some space or change output_dir. Checkpoints published before are as they were"
        ) from error
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)


@contextmanager
def publication_of_ranks(output_dir: Path, name: str, facts: Mapping[str, Any]) -> Iterator[Draft]:
    """Give all ranks the same draft to fill; rank 0, the last to leave, publishes it."""
    if rank() == 0:
        with publication(output_dir, name, facts) as draft:
            from_rank_0(draft.path.name)
            yield draft
    else:
        yield Draft(output_dir / from_rank_0(""))


def _manifest(
    name: str, facts: Mapping[str, Any], records: Mapping[str, FileRecord]
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        **facts,
        "versions": versions("torch", "safetensors"),
        "files": {
            file: {
                "size": record.size,
                "sha256": record.sha256,
                **({"tensors": _described(record)} if record.tensors else {}),
            }
            for file, record in records.items()
        },
    }


def _described(record: FileRecord) -> dict[str, str]:
    return {name: str(spec) for name, spec in record.tensors.items()}


def _put_in_place(draft: Path, target: Path) -> None:
    """Rename a draft to its name, read it back, and only then drop what had that name before.

    What bears that name and is not ours is kept beside it.
    """
    ours = (target / MANIFEST).is_file()
    aside = target.with_name(f"{target.name}.{'old' if ours else 'kept'}-{uuid4().hex}")
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(draft, target)
        fsync_directory(target.parent)
        problems = verify(target)
        if problems:
            raise ResourceError(f"{target} was written but reads back differently", problems)
    except (OSError, TuneError):
        if target.exists():
            os.rename(target, draft)
        if aside.exists():
            os.rename(aside, target)
        raise
    if ours and aside.is_symlink():
        aside.unlink()  # what it leads to stays
    elif ours:
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        log.warning("%s was there before and is not mytune's: it is now %s", target, aside.name)


def verify(checkpoint: Path) -> list[str]:
    """Compare a published checkpoint with its manifest; return what is wrong with it."""
    try:
        files = read_manifest(checkpoint)["files"].items()
        with ThreadPoolExecutor(4) as pool:  # hashing, unlike most of Python, runs side by side
            found = pool.map(lambda item: _wrong(checkpoint, *item), files)
            return [text for text in found if text]
    except (CheckpointError, OSError) as error:
        return [str(error)]


def _wrong(checkpoint: Path, name: str, said: Mapping[str, Any]) -> str | None:
    path = inside(checkpoint, name)
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != said["size"]:
        return f"{name} has {size:,} bytes, not {said['size']:,}"
    return None if sha256_of(path) == said["sha256"] else f"{name} is corrupt: its sha256 differs"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a manifest; raise CheckpointError if it is not one that this version understands."""
    manifest = read_json(checkpoint / MANIFEST)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{MANIFEST} has format_version {version}, not {FORMAT_VERSION}")
    files = manifest.get("files")
    complete = isinstance(files, dict) and all(
        isinstance(said, dict)
        and type(said.get("size")) is int
        and isinstance(said.get("sha256"), str)
        for said in files.values()
    )
    step = manifest.get("step")
    if not complete or type(step) is not int or not 0 <= step < 2**53:
        raise CheckpointError(f"{MANIFEST} does not say step and files")
    return manifest


class Candidate(NamedTuple):
    """A directory that looks like a published checkpoint; `step` is -1 where no manifest tells."""

    path: Path
    step: int


def candidates(output_dir: Path) -> list[Candidate]:
    """Return the checkpoints of an output directory, newest first: by step, not by file time."""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            try:
                found.append(Candidate(path, read_manifest(path)["step"]))
            except CheckpointError:
                found.append(Candidate(path, -1))
    return sorted(found, key=lambda candidate: (-candidate.step, candidate.path.name))


def prune(
    output_dir: Path, keep: int, needed: Collection[Path], losses: Mapping[int, float]
) -> None:
    """Remove all but the last `keep` checkpoints, and the one with the lowest loss.

    Args:
        needed: always stay: the newest, just verified, and what the run reads.
        losses: by step, as far as they are known.
    """
    stay = {path.resolve() for path in needed}
    found = [each for each in candidates(output_dir) if each.step >= 0]
    best = min((step for _, step in found if step in losses), key=losses.__getitem__, default=None)
    older = [each for each in found if each.path.resolve() not in stay]
    for path, step in older[keep - 1 :]:
        if step != best:
            log.info("Removing %s (keep_last_n_checkpoints=%d)", path, keep)
            remove(path)


def remove(checkpoint: Path) -> None:
    """Take a checkpoint away; at no moment does half of it stand under its name."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.del-{uuid4().hex}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def clean_up(output_dir: Path) -> None:
    """Finish or remove what killed runs left; call it only while holding the directory's lock.

    A complete draft is renamed to its name unless that is taken; so is a checkpoint that was moved
    aside for one that never came.
    """
    leftovers = [
        (match[2] != "tmp", path, output_dir / match[1], match[2])
        for path in output_dir.iterdir()
        if (match := _LEFTOVER.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    ]
    for _, path, target, kind in sorted(leftovers):
        if kind != "del" and not target.exists() and not verify(path):
            log.info("A stopped run had completed %s: it is now %s", path.name, target.name)
            os.rename(path, target)
        else:
            log.info("Removing %s, left by a run that was stopped", path)
            shutil.rmtree(path)
    if leftovers:
        fsync_directory(output_dir)
