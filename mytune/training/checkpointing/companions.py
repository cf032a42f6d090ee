"""The small files that lie beside weights and that other programs need to load them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

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


def companions(source: Path, dtype: torch.dtype) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents to copy; `config.json` names the type that the weights now have.

    Hugging Face's tokenizer files are made where only Meta's is there.
    """
    for name, path in companion_files(source).items():
        yield name, _retyped(path, dtype) if name == "config.json" else path.read_bytes()
    yield from tokenizer_files(source)


def _retyped(path: Path, dtype: torch.dtype) -> bytes:
    """Return a config.json that names `dtype`; the very same bytes where it already does."""
    config, name = read_json(path), str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if all(config.get(key) == name for key in keys):
        return path.read_bytes()
    return to_json({**config, **dict.fromkeys(keys, name)})
