"""Tokens in flat arrays on disk, mapped into memory: tokenized datasets, and how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mytune.datasets.sources import Row
from mytune.errors import ConfigError, DataError

IGNORE_INDEX = -100
OnBadRow = Literal["error", "skip"]
IntArray: TypeAlias = npt.NDArray[np.int64]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Encode = Callable[[Mapping[str, Any]], tuple[list[int], list[bool]]]

_FILES = {"tokens": np.int32, "trained": np.bool_, "offsets": np.int64}


class Sample(TypedDict):
    """One row, or one pack of rows; arrays of int32 [n].

    `labels[t]` is the token that position t learns to predict, `tokens[t + 1]`, or -100. Packs also
    have each token's position in its document, and the document's number in the pack.
    """

    tokens: Int32Array
    labels: Int32Array
    positions: NotRequired[Int32Array]
    document_ids: NotRequired[Int32Array]


@dataclass(frozen=True)
class Stats:
    """What was read: rows kept, rows skipped as bad, rows cut at the length limit, tokens.

    `slots` is the room for tokens in all packs, 0 if not packed; `first_skipped`: where and why.
    """

    rows: int = 0
    skipped: int = 0
    truncated: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    slots: int = 0
    first_skipped: str = ""

    def __str__(self) -> str:
        """One line for the log."""
        parts = [
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trainable_tokens:,} of them trained"
        ]
        if self.slots:
            parts.append(f"packs {self.tokens / self.slots:.1%} full")
        if self.truncated:
            parts.append(f"{self.truncated:,} rows truncated to max_seq_len")
        if self.skipped:
            parts.append(f"{self.skipped:,} bad rows skipped, the first: {self.first_skipped}")
        return "; ".join(parts)


class Dataset(Protocol):
    """What batches are made of."""

    @property
    def lengths(self) -> IntArray:
        """Tokens in each sample."""

    @property
    def fingerprint(self) -> str:
        """Equal for two datasets only if all their samples are equal."""

    @property
    def stats(self) -> Stats:
        """What was read."""

    @property
    def pad_to(self) -> int | None:
        """Length that every batch is padded to; None for that of its longest sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class TokenDataset:
    """Rows as tokens, mapped from a folder that `write_tokens` wrote.

    Raises:
        OSError, ValueError, KeyError, TypeError: the folder is not there or not complete.
    """

    pad_to = None

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "about.json").read_text())
        self.fingerprint: str = about["fingerprint"]
        self.stats = Stats(**about["stats"])
        sizes = {
            "tokens": self.stats.tokens,
            "trained": self.stats.tokens,
            "offsets": self.stats.rows + 1,
        }
        # `.view`: slices of a memmap object cost ten times as much as those of a plain array.
        self._tokens, self._trained, self._offsets = (
            np.memmap(folder / name, dtype, "r").view(np.ndarray) for name, dtype in _FILES.items()
        )
        found = {
            "tokens": len(self._tokens),
            "trained": len(self._trained),
            "offsets": len(self._offsets),
        }
        if found != sizes or self._offsets[-1] != self.stats.tokens:
            raise ValueError(f"{folder} is not complete: {found}, expected {sizes}")

    @cached_property
    def lengths(self) -> IntArray:
        """Tokens in each row."""
        return np.diff(self._offsets)

    def __len__(self) -> int:
        return self.stats.rows

    def __getitem__(self, index: int) -> Sample:
        """Return a row."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.piece(index, 0, int(self.lengths[index]))

    def piece(self, index: int, start: int, stop: int) -> Sample:
        """Return tokens `start` to `stop` of a row; the last one learns the token after it, if any."""
        begin, end = self._offsets[index] + start, self._offsets[index] + stop
        after = min(end + 1, self._offsets[index + 1])
        labels = np.full(stop - start, IGNORE_INDEX, dtype=np.int32)
        following = slice(begin + 1, after)
        labels[: after - begin - 1] = np.where(
            self._trained[following], self._tokens[following], IGNORE_INDEX
        )
        return {"tokens": np.array(self._tokens[begin:end]), "labels": labels}


def write_tokens(
    folder: Path,
    rows: Iterable[Row],
    encode: Encode,
    max_seq_len: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> None:
    """Tokenize rows into a folder, one at a time; longer rows are cut, without a forced end token.

    Args:
        encode: gives a row's tokens and, for each, whether it is trained; DataError for a bad row.

    Raises:
        DataError: a bad row (`file:row`), if they are not skipped; no row; nothing to train.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it can be error or skip")
    count = dict.fromkeys(("rows", "skipped", "truncated", "tokens", "trainable_tokens"), 0)
    first_skipped = ""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        tokens_file, trained_file, offsets_file = (
            stack.enter_context(open(folder / name, "wb")) for name in _FILES
        )
        offsets_file.write(np.int64(0).tobytes())
        for row in _progress(rows):
            try:
                tokens, trained = _encode(row, encode)
            except DataError as error:
                if on_bad_row == "error":
                    raise DataError(f"{error}; on_bad_row=skip leaves such rows out") from error
                first_skipped = first_skipped or str(error)
                count["skipped"] += 1
                continue
            length = min(len(tokens), max_seq_len or len(tokens))
            count["rows"] += 1
            count["truncated"] += length < len(tokens)
            count["tokens"] += length
            count["trainable_tokens"] += int(
                trained[1:length].sum()
            )  # nothing predicts the first one
            for file, array in ((tokens_file, tokens[:length]), (trained_file, trained[:length])):
                file.write(array.tobytes())
                digest.update(array.tobytes())
            offset = np.int64(count["tokens"]).tobytes()
            offsets_file.write(offset)
            digest.update(offset)
        for file in (tokens_file, trained_file, offsets_file):
            file.flush()
            os.fsync(file.fileno())
    stats = Stats(**count, first_skipped=first_skipped)
    _check_useful(stats)
    about = {"fingerprint": digest.hexdigest(), "stats": asdict(stats)}
    (folder / "about.json").write_text(json.dumps(about))


def _encode(row: Row, encode: Encode) -> tuple[Int32Array, npt.NDArray[np.bool_]]:
    """Return a row's tokens and which are trained. Raises DataError that names the row."""
    try:
        if isinstance(row.values, DataError):
            raise row.values
        if not isinstance(row.values, Mapping):
            raise DataError(f"is a {type(row.values).__name__}, not an object with named columns")
        tokens, trained = encode(row.values)
        if not tokens:
            raise DataError("has no token")
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    return np.array(tokens, dtype=np.int32), np.array(trained, dtype=np.bool_)


def _progress(rows: Iterable[Row]) -> Iterable[Row]:
    """Show progress if it takes longer than 2 s; where nobody looks, every 30 s."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(rows, desc="tokenizing", unit=" rows", delay=2, mininterval=interval)


def _check_useful(stats: Stats) -> None:
    if not stats.rows:
        first = f": all {stats.skipped:,} were skipped, the first: {stats.first_skipped}"
        raise DataError(
            f"the dataset has no rows{first if stats.skipped else ''}; change its source or split"
        )
    if not stats.trainable_tokens:
        raise DataError(
            f"none of the dataset's {stats.tokens:,} tokens is trained: no row has an answer of the "
            "assistant before max_seq_len cuts it; check the roles, tokenizer.max_seq_len, train_on_input"
        )
