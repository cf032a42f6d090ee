"""The output directory of a run: one run at a time, files whole, nobody's results lost."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mytune.errors import DirectoryInUseError, ResourceError
from mytune.training.checkpointing.publish import MANIFEST, candidates, clean_up, remove
from mytune.training.disk import writing
from mytune.training.distributed import barrier, from_rank_0, rank, restarts

log = logging.getLogger("mytune")

LOCK = ".mytune.lock"
_TAKEN = ".mytune.taken"  # a run has begun to train here, and has not ended well
_RESULTS = ("metrics.jsonl", "summary.json")
_FILES = (*_RESULTS, "config.yaml", "loss_curve.png")
# A link in a folder that came from elsewhere could lead to any file.
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@contextmanager
def output_dir_lock(path: str | Path, key: str = "output_dir") -> Iterator[Path]:
    """Own an output directory, made if need be, until the block ends; clean up after dead runs.

    The kernel's lock on a file says whether its owner lives; the file's content says who it is.

    Args:
        key: of the config, that names the directory.

    Raises:
        DirectoryInUseError: another run owns it.
        ResourceError: it cannot be made or written.
    """
    directory = Path(path)
    lock = directory / LOCK
    if rank() != 0:
        barrier()
        yield directory
        return
    with writing(directory, key):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(lock, key)
    try:
        clean_up(directory)
        for draft in (path for name in _FILES for path in directory.glob(f".{name}.tmp-*")):
            draft.unlink()
        if restarts() == 0:
            (directory / _TAKEN).unlink(missing_ok=True)
        barrier()
        yield directory
        (directory / _TAKEN).unlink(missing_ok=True)
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, key: str) -> int:
    while True:
        descriptor = os.open(lock, _OPEN, 0o644)
        try:
            _lock(descriptor, lock, key)
            if _is_still(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_identity()).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed it while we opened it


def _lock(descriptor: int, lock: Path, key: str) -> None:
    me, owner = _identity(), _owner(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise DirectoryInUseError(
            f"{key}: {lock.parent} belongs to a run that is going on ({_describe(owner)}); "
            "wait for it or choose another directory"
        ) from error
    owner = _owner(descriptor)
    if not owner:
        return
    # A lock need not reach over a network file system: only our own machine is known rid of it.
    if me["boot_id"] != owner.get("boot_id") and me["host"] != owner.get("host"):
        raise DirectoryInUseError(
            f"{key}: {lock.parent} belongs to a run on another machine ({_describe(owner)}); "
            f"if it has ended, delete {lock}"
        )
    log.warning("Taking over %s from a run that died (%s)", lock.parent, _describe(owner))


def _identity() -> dict[str, Any]:
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": boot_id.read_text().strip() if boot_id.is_file() else "",
    }


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    return f"pid {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"


def _is_still(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def check_output_dir(
    path: str | Path,
    key: str = "output_dir",
    *,
    resume: bool,
    overwrite: bool,
    inputs: Sequence[str | Path] = (),
) -> None:
    """Keep a new run from mixing with the results of another; call it while holding the lock.

    Args:
        key: of the config, that names the directory.
        resume: the run goes on with what is there.
        overwrite: `take` will remove what is there.
        inputs: directories this run reads; one that would be removed is refused.

    Raises:
        DirectoryInUseError: there are results, and neither `resume` nor `overwrite` is set.
        ResourceError: a folder stands where the run will write a file.
    """
    directory = Path(path)
    if taken := [name for name in _FILES if (directory / name).is_dir()]:
        raise ResourceError(
            f"{key}: {directory / taken[0]} is a folder, and a file of this run would have "
            "that name; choose another directory"
        )
    checkpoints, files = _results(directory)
    if rank() != 0 or resume or not (checkpoints or files):
        return
    read = [Path(each).resolve() for each in inputs]
    needed = [str(c) for c in checkpoints if any(r.is_relative_to(c.resolve()) for r in read)]
    if not overwrite or needed:
        what = ", ".join(found.name for found in [*checkpoints, *files][:5])
        raise DirectoryInUseError(
            f"{key}: {directory} holds the results of another run ({what}); choose another "
            "directory, or set resume_from_checkpoint=True"
            + (f" (this run reads {needed[0]})" if needed else " or overwrite_output_dir=True")
        )


def take(path: str | Path, *, resume: bool) -> None:
    """Make a directory this run's; what another one left there goes, unless this one resumes."""
    if rank() != 0:
        return
    with writing(Path(path)):
        checkpoints, files = ([], []) if resume else _results(Path(path))
        for checkpoint in checkpoints:
            remove(checkpoint)
        for file in files:
            file.unlink()
        (Path(path) / _TAKEN).touch()


def was_taken(path: str | Path) -> bool:
    """Say whether this run took a directory before torchrun started it anew; all ranks ask."""
    return restarts() > 0 and from_rank_0((Path(path) / _TAKEN).exists())


def _results(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints and files by which a run's results are known."""
    checkpoints = [c.path for c in candidates(directory) if (c.path / MANIFEST).is_file()]
    return checkpoints, [directory / name for name in _RESULTS if (directory / name).is_file()]
