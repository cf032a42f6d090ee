"""The token cache: a folder per dataset, written once by who comes first, then mapped by all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock

from mytune.datasets.tokens import TokenDataset
from mytune.errors import ResourceError

log = logging.getLogger("mytune")

Write = Callable[[Path], None]


def cache_folder() -> Path:
    """Return where tokens are kept: `tokens/` in `$MYTUNE_CACHE_DIR` or `~/.cache/mytune`."""
    return Path(os.environ.get("MYTUNE_CACHE_DIR") or Path.home() / ".cache" / "mytune") / "tokens"


def cache_key(*parts: Any) -> str:
    """Return a name for tokens made from `parts` (JSON) by this version of the code."""
    return hashlib.sha256(json.dumps([*parts, _code_version()]).encode()).hexdigest()[:32]


@cache
def _code_version() -> str:
    """Return a hash of the code that makes tokens, so that no change to it is overlooked."""
    package = Path(__file__).parent.parent
    files = sorted([*package.glob("datasets/*.py"), *package.glob("tokenizers/*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def load_or_write(key: str | None, write: Write) -> TokenDataset:
    """Return the tokens kept under `key`; if there are none, or damaged ones, `write` them first.

    Several processes may ask at once: one writes, the others wait. Without a key, or where the
    cache cannot be written, the tokens are in a temporary folder that ends with this process.
    """
    if key is None:
        return _temporary(write)
    folder = cache_folder() / key
    if kept := _open(folder):
        return kept
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter: no locks on this disk
        log.warning(
            "the token cache %s cannot be written (%s): rows are tokenized again in every run; "
            "MYTUNE_CACHE_DIR names another folder",
            folder.parent,
            getattr(error, "strerror", None) or error,
        )
        return _temporary(write)
    try:
        return _open(folder) or _publish(folder, write)
    finally:
        lock.release()


def _open(folder: Path) -> TokenDataset | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return TokenDataset(folder)
    return None


def _publish(folder: Path, write: Write) -> TokenDataset:
    """Write beside the folder, then rename; only the holder of the lock comes here."""
    for old in (folder, *folder.parent.glob(f"{folder.name}.tmp-*")):
        shutil.rmtree(old, ignore_errors=True)  # damaged, or left by a process that was killed
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        write(temporary)
        temporary.rename(folder)
    except OSError as error:
        raise _no_room(folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenDataset(folder)


def _temporary(write: Write) -> TokenDataset:
    """Write to a folder that is gone at once; what is mapped from it stays."""
    try:
        with TemporaryDirectory(prefix="mytune-tokens-", ignore_cleanup_errors=True) as name:
            write(Path(name))
            return TokenDataset(Path(name))
    except OSError as error:
        raise _no_room(Path(error.filename or "the temporary folder"), error) from error


def _no_room(folder: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"tokens cannot be written to {folder}: {error.strerror or error}; free some space there, "
        "or name another folder with MYTUNE_CACHE_DIR (TMPDIR for temporary ones)"
    )
