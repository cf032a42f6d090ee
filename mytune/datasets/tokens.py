"""Tokenized datasets: flat arrays on disk, mapped into memory, and how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, NotRequired, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mytune.datasets.sources import Row
from mytune.errors import ConfigError, DataError, TuneError, first_line

IGNORE_INDEX = -100
_PACKAGE = str(Path(__file__).parents[1])
OnBadRow = Literal["error", "skip"]
IntArray: TypeAlias = npt.NDArray[np.int64]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Encode = Callable[[Mapping[str, Any]], tuple[list[int], list[bool]]]

# Row i is `offsets[i]` to `offsets[i + 1]` of the other two.
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


@dataclass
class Stats:
    """What was read: rows kept, bad rows skipped, rows cut at the length limit, tokens.

    `untrained` rows are kept, but nothing in them is trained. `slots` is the room for tokens in all
    packs, 0 if not packed; `first_skipped`: where and why.
    """

    rows: int = 0
    skipped: int = 0
    truncated: int = 0
    untrained: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    slots: int = 0
    first_skipped: str = ""

    def __str__(self) -> str:
        """One line for the log."""
        trained = f"{self.trainable_tokens:,} trained"
        parts = [f"{self.rows:,} rows, {self.tokens:,} tokens ({trained})"]
        if self.slots:
            parts.append(f"packs {self.tokens / self.slots:.1%} full")
        if self.truncated:
            parts.append(f"{self.truncated:,} rows truncated to max_seq_len")
        if self.untrained:
            parts.append(f"{self.untrained:,} rows without a trained token")
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
        OSError, ValueError, KeyError, TypeError: the folder is not there, or not complete.
    """

    pad_to = None

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "about.json").read_text())
        self.fingerprint: str = about["fingerprint"]
        self.stats = Stats(**about["stats"])
        # `.view`: a slice of a memmap object costs ten times as much as one of a plain array.
        self._tokens, self._trained, self._offsets = arrays = [
            np.memmap(folder / name, dtype, "r").view(np.ndarray) for name, dtype in _FILES.items()
        ]
        expected = [self.stats.tokens, self.stats.tokens, self.stats.rows + 1]
        if [len(array) for array in arrays] != expected or self._offsets[-1] != self.stats.tokens:
            raise ValueError(f"{folder} is not complete")

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
        """Return tokens `start` to `stop` of a row; the last learns the one after it, if any."""
        row, row_end = self._offsets[index : index + 2].tolist()
        tokens = slice(row + start, row + stop)
        following = slice(tokens.start + 1, min(tokens.stop + 1, row_end))
        labels = np.full(stop - start, IGNORE_INDEX, dtype=np.int32)
        trained, targets = self._trained[following], self._tokens[following]
        labels[: len(targets)] = np.where(trained, targets, IGNORE_INDEX)
        return {"tokens": self._tokens[tokens].copy(), "labels": labels}


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
        DataError: a bad row (`file:row`), if they are not skipped; a row at which code of the
            user's own fails; no row; nothing to train.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it can be error or skip")
    stats, digest = Stats(), hashlib.sha256()
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "wb")) for name in _FILES]
        files[-1].write(np.int64(0).tobytes())
        for tokens, trained in _encoded(_progress(rows), encode, on_bad_row, stats):
            stats.truncated += len(tokens) > len(tokens[:max_seq_len])
            tokens, trained = tokens[:max_seq_len], trained[:max_seq_len]
            stats.rows += 1
            stats.tokens += len(tokens)
            targets = int(trained[1:].sum())  # no token predicts the first
            stats.trainable_tokens += targets
            stats.untrained += targets == 0
            for file, array in zip(files, (tokens, trained, np.int64(stats.tokens)), strict=True):
                file.write(array.tobytes())
                digest.update(array.tobytes())
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    _check_useful(stats)
    about = {"fingerprint": digest.hexdigest(), "stats": asdict(stats)}
    (folder / "about.json").write_text(json.dumps(about))


def _encoded(
    rows: Iterable[Row], encode: Encode, on_bad_row: OnBadRow, stats: Stats
) -> Iterator[tuple[Int32Array, npt.NDArray[np.bool_]]]:
    """Yield the tokens of good rows and which of them are trained; count the others or raise."""
    for row in rows:
        try:
            tokens, trained = _encode_row(row.values, encode)
        except DataError as error:
            problem = f"{row.where}: {error}"
            if on_bad_row == "error":
                raise DataError(f"{problem}; on_bad_row=skip leaves such rows out") from error
            stats.skipped += 1
            stats.first_skipped = stats.first_skipped or problem
            continue
        except Exception as error:
            raise_with_row(error, row.where)
        yield np.array(tokens, dtype=np.int32), np.array(trained, dtype=np.bool_)


def _encode_row(values: Any, encode: Encode) -> tuple[list[int], list[bool]]:
    if isinstance(values, DataError):
        raise values
    if not isinstance(values, Mapping):
        raise DataError(f"the row is a {type(values).__name__}, not an object with named columns")
    tokens, trained = encode(values)
    if not tokens:
        raise DataError("the row has no token")
    return tokens, trained


def raise_with_row(error: Exception, where: str) -> NoReturn:
    """Tell at which row, and in which line of the user's own code, an error was raised.

    One that is not of such code, or not of the row, such as a package that is not installed, stays
    what it is and gets a note.
    """
    ours = tuple(f"{folder}{os.sep}" for folder in (_PACKAGE, sys.prefix, sys.base_prefix))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((*ours, "<"))]
    if not theirs or isinstance(error, TuneError | ImportError | MemoryError):
        error.add_note(f"at {where}")
        raise error
    raise DataError(
        f"{where}: {type(error).__name__}: {first_line(error)} "
        f"({theirs[-1].filename}:{theirs[-1].lineno}); --debug prints the traceback"
    ) from error


def _progress(rows: Iterable[Row]) -> Iterable[Row]:
    """Show progress if it takes longer than 2 s; where nobody looks, every 30 s."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(rows, desc="tokenizing", unit=" rows", delay=2, mininterval=interval)


def _check_useful(stats: Stats) -> None:
    if not stats.rows:
        skipped = f": all {stats.skipped:,} are bad, the first: {stats.first_skipped}"
        raise DataError(
            f"the dataset has no rows{skipped if stats.skipped else ''}; change its source or split"
        )
    if not stats.trainable_tokens:
        raise DataError(
            f"none of the dataset's {stats.tokens:,} tokens is trained: no row has an answer, or "
            "max_seq_len cuts all; check the rows' roles, tokenizer.max_seq_len, train_on_input"
        )
