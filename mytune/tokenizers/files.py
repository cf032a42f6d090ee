"""Tokenizer files found and read: Meta's tiktoken ranks, Hugging Face's `tokenizer.json`."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from binascii import a2b_base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from mytune.errors import CheckpointError, ConfigError, MissingTokenizer, ResourceError

log = logging.getLogger("mytune")

TIKTOKEN = ("tokenizer.model", "original/tokenizer.model")
PLACES = (*TIKTOKEN, "tokenizer.json")

_LONGEST_TOKEN = 4096  # bytes; to write its merges takes memory by the square of that
_WRONG_FILES = {
    rb"\n.\n.<": "a SentencePiece model, as Llama 2 has; Llama 3's own tokenizer.model is needed",
    rb"version https://git-lfs": "a Git LFS pointer; download the file that it points at",
    rb"\s*<": "an HTML or XML page, not a tokenizer; download the file again",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer file holds.

    Args:
        encode: text to ids; special tokens in the text are text.
        tokens: id -> bytes of every id that `encode` can return.
        special_tokens: name -> id; None for a tiktoken file, which does not hold them.
        digest: sha256 of the file.
    """

    encode: Callable[[str], list[int]]
    tokens: dict[int, bytes]
    special_tokens: dict[str, int] | None
    digest: str


def find_tokenizer(path: str | Path) -> Path:
    """Return the tokenizer file at `path`, or in it if it is a directory (see `PLACES`)."""
    given = Path(path).expanduser()
    folder = given if given.is_dir() else given.parent
    found = [folder / place for place in PLACES if (folder / place).is_file()]
    original = folder / "original" / given.name  # where Hugging Face's repositories keep Meta's
    if not given.exists() and original.is_file():
        log.info("tokenizer: %s is not there, %s is used", given, original)
        return original
    if given.is_file() or (given.is_dir() and found):
        return given if given.is_file() else found[0]
    there = _what_is_there(folder, found)
    raise MissingTokenizer(f"no tokenizer file at {str(given)!r}; {there}; change tokenizer.path")


def read_vocabulary(path: Path, pattern: str) -> Vocabulary:
    """Read a tokenizer file; its first bytes, not its name, say which kind it is.

    Args:
        pattern: the regex that splits text into words; a `tokenizer.json` has its own.
    """
    data = _read(path)
    for start, what in _WRONG_FILES.items():
        if re.match(start, data[:100], re.DOTALL):
            raise CheckpointError(f"{path} is {what}")
    is_json = data[:100].lstrip().startswith(b"{")
    return _read_json(path, data) if is_json else _read_tiktoken(path, data, pattern)


def read_special_tokens(path: str | Path) -> dict[str, int]:
    """Return name -> id of the special tokens that a `tokenizer.json` adds."""
    try:
        added = json.loads(_read(Path(path).expanduser()))["added_tokens"]
        special = [token for token in added if token.get("special", True)]
        if not all(isinstance(token["content"], str) for token in special):
            raise TypeError("a token's content is no text")
        return {token["content"]: int(token["id"]) for token in special}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a tokenizer.json with 'added_tokens' ({error!r}); "
            "change tokenizer.special_tokens_path"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"no file at {str(path)!r}; change tokenizer.special_tokens_path"
        ) from error
    except OSError as error:
        raise ResourceError(
            f"cannot read tokenizer file {str(path)!r}: {error.strerror}"
        ) from error


def _what_is_there(folder: Path, found: list[Path]) -> str:
    if not folder.is_dir():
        return f"the directory {str(folder)!r} does not exist"
    if found:
        return f"did you mean {str(found[0])!r}?"
    names = sorted(entry.name for entry in folder.iterdir())
    if {"adapter", "adapter_config.json"} & {*names} and "config.json" not in names:
        keys = "its base is checkpointer.checkpoint_dir, it is checkpointer.adapter_checkpoint"
        return f"{str(folder)!r} holds an adapter and no model: {keys}"
    listing = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "nothing"
    usual = "Hugging Face repositories keep it at original/tokenizer.model"
    return f"{str(folder)!r} holds {listing} ({usual})"


# --- Meta's tiktoken file: a line per token, "base64 rank"; the rank is the id ---


def _read_tiktoken(path: Path, data: bytes, pattern: str) -> Vocabulary:
    lines = data.splitlines()
    try:
        ranks = dict(map(_token_and_rank, lines))
    except ValueError:
        ranks = {}
    tokens = {rank: token for token, rank in ranks.items()}
    if not lines or tokens.keys() != set(range(len(lines))):
        raise CheckpointError(f"{path}{_first_fault(lines)}")
    if (longest := max(map(len, ranks))) > _LONGEST_TOKEN:
        raise CheckpointError(f"{path} has a token of {longest:,} bytes, which is no word")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(
            f"{path} lacks tokens for {len(missing)} single bytes, the first {missing[0]:#04x}"
        )
    encoding = tiktoken.Encoding(
        path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    return Vocabulary(encoding.encode_ordinary, tokens, None, hashlib.sha256(data).hexdigest())


def _token_and_rank(line: bytes) -> tuple[bytes, int]:
    token, rank = line.split()
    return a2b_base64(token, strict_mode=True), int(rank)


def _first_fault(lines: list[bytes]) -> str:
    """Say which line makes the file useless; slow, for a file that is known to be bad."""
    ids: set[int] = set()
    tokens: set[bytes] = set()
    for number, line in enumerate(lines, 1):
        try:
            token, rank = _token_and_rank(line)
        except ValueError:
            return f":{number} is {line[:40]!r}, not tiktoken's base64 token and its rank"
        if rank in ids or token in tokens:
            return f":{number} repeats a token or rank of an earlier line: {line[:40]!r}"
        if not 0 <= rank < len(lines):
            return f":{number} has rank {rank}; {len(lines)} lines have ranks below {len(lines)}"
        ids.add(rank)
        tokens.add(token)
    return " is empty"


# --- Hugging Face's tokenizer.json: byte-level BPE ---


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + position): byte for position, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


def _read_json(path: Path, data: bytes) -> Vocabulary:
    from tokenizers import Tokenizer  # not needed for a tiktoken file

    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # all that the library raises
        raise CheckpointError(
            f"{path} is not a tokenizer.json that can be read: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # sic: encode what looks like one as text
    added = tokenizer.get_added_tokens_decoder()
    tokens = _bytes_of_vocabulary(path, tokenizer.get_vocab(with_added_tokens=False))
    special = {token.content: i for i, token in added.items() if token.special}
    tokens |= {i: token.content.encode() for i, token in added.items() if not token.special}
    for token_id in special.values():
        tokens.pop(token_id, None)
    encode = functools.partial(_encode_json, tokenizer)
    return Vocabulary(encode, tokens, special, hashlib.sha256(data).hexdigest())


def _bytes_of_vocabulary(path: Path, vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    byte_of = byte_alphabet()
    try:
        if not byte_of.keys() <= vocabulary.keys():
            raise KeyError("single bytes")
        return {i: bytes(map(byte_of.__getitem__, piece)) for piece, i in vocabulary.items()}
    except KeyError as error:
        raise CheckpointError(
            f"{path} is not a byte-level BPE as Llama 3's is: {error} not found"
        ) from error


def _encode_json(tokenizer: Any, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except TypeError:  # a lone surrogate, as JSON may hold: tiktoken replaces it in this way
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
