"""Writing to the disk: errors that name the place, files that are whole, room that is checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mytune.errors import ResourceError


@contextmanager
def writing(path: Path, key: str = "output_dir") -> Iterator[None]:
    """Turn a failed write into an error that names the file or directory, and its key."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        why = f"it is a file, or lies below one; choose another {key}"
        raise ResourceError(f"{key}: cannot write in {path}: {why}") from error
    except OSError as error:
        raise ResourceError(
            f"{key}: cannot write in {path}: {error.strerror}; "
            f"free space, change permissions, or choose another {key}"
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file such that it is at every moment the old one or the new one."""
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with writing(path):
        try:
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def check_disk_space(path: str | Path, needed: int) -> None:
    """Raise ResourceError unless the disk that holds (or will hold) `path` has that many bytes."""
    existing = next(
        p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists()
    )
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"output_dir: {path} has {format_size(free)} free, a checkpoint needs "
            f"{format_size(needed)}; free some space, change output_dir, or set "
            "save_adapter_weights_only=True or keep_last_n_checkpoints"
        )


def format_size(nbytes: int) -> str:
    """Return a size for people."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.2f} MiB"
