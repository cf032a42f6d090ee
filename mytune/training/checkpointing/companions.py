"""The small files that lie beside weights and that other programs need to load them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mytune.errors import CheckpointError
from mytune.training.checkpointing.files import inside, read_json, to_json
from mytune.training.checkpointing.tokenizer_files import tokenizer_files

_MAX_BYTES = 64 * 2**20
# Only these are copied: a downloaded directory may hold anything.
_COPIED = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "original/params.json",
    "original/tokenizer.model",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)

Json = dict[str, Any]


def companion_files(source: Path) -> dict[str, Path]:
    """Return name -> path of the files to copy from a checkpoint's directory; none is over 64 MB.

    Raises:
        CheckpointError: one of them is a link that leads out of the directory.
    """
    found = {}
    for path in (path for pattern in _COPIED for path in sorted(source.glob(pattern))):
        name = path.relative_to(source).as_posix()
        if inside(source, name).is_file() and path.stat().st_size <= _MAX_BYTES:
            found[name] = path
    return found


def companions(
    source: Path,
    dtype: torch.dtype,
    stop_tokens: Sequence[int] = (),
    chat_template: str | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents to copy, where they must with what the weights now are.

    Hugging Face's tokenizer files are made where only Meta's is there.

    Args:
        dtype: of the weights, for config.json.
        stop_tokens: ids that end an answer, beside those that end it already.
        chat_template: for a model that has none.
    """
    files = companion_files(source)
    if any(name.startswith("chat_template") for name in files):
        chat_template = None
    changes: dict[str, Callable[[Json], Json]] = {
        "config.json": lambda said: _typed(said, dtype) | _ending(said, stop_tokens),
        "generation_config.json": lambda said: _ending(said, stop_tokens),
        "tokenizer_config.json": lambda said: {"chat_template": chat_template, **said},
    }
    if chat_template is None:
        del changes["tokenizer_config.json"]
    for name, path in files.items():
        yield name, _changed(path, changes[name]) if name in changes else path.read_bytes()
    yield from tokenizer_files(source)


def _changed(path: Path, change: Callable[[Json], Json]) -> bytes:
    """Return a JSON file with what is to change; the very same bytes where nothing does."""
    with suppress(CheckpointError):  # none of a run's business: it is copied as it is
        said = read_json(path)
        if (new := {**said, **change(said)}) != said:
            return to_json(new)
    return path.read_bytes()


def _typed(config: Json, dtype: torch.dtype) -> Json:
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return dict.fromkeys(keys, str(dtype).removeprefix("torch."))


def _ending(said: Json, stop_tokens: Sequence[int]) -> Json:
    """Return the setting by which generation ends at `stop_tokens`, too."""
    ends = said.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    more = [token for token in stop_tokens if token not in ends]
    return {"eos_token_id": [*ends, *more]} if more else {}
