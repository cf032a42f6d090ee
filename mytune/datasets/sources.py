"""Rows of a data set as a stream: from json, jsonl, csv, parquet and txt files, or from the hub."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mytune.errors import (
    ConfigError,
    DataError,
    UnreachableError,
    did_you_mean,
    first_line,
    is_network,
)

Numbered = Iterator[tuple[int, Any]]
DataFiles = str | list[str] | Mapping[str, str | list[str]] | None

_CHUNK = 1 << 20
_HASHED = 1 << 30  # larger files are known by name, size and time: hashing takes a second per GiB
_SEPARATOR = re.compile(r"[\s,]*")
_SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
# Words in the names of files in a folder that tell which split they belong to.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class Row(NamedTuple):
    """One row: `file:row`, and its columns, or why it could not be read."""

    where: str
    values: Any


@dataclass(frozen=True)
class Source:
    """Rows that can be read more than once.

    `identity` is equal for equal rows, None where that cannot be known.
    """

    identity: str | None
    read: Callable[[], Iterable[Row]]


def open_source(
    source: str | list[str],
    split: str = "train",
    data_files: DataFiles = None,
    data_dir: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    sample_by: str = "line",
) -> Source:
    """Find the rows that `source` names; nothing of local files is read but for their identity.

    Args:
        source: a file, a folder, a glob, a list of these, or a data set on the hub; or one of json,
            csv, parquet and text, with its `data_files`.
        split: `train`, `train[:1000]`, `train[10%:]`. Of a folder it takes the files that have the
            split's word in their names, or for `train`, if there are none, all files.
        name, revision: configuration and version of a data set on the hub.
        sample_by: what a row of a txt file is: a `line`, a `paragraph` (up to an empty line), or
            the whole file, `document`.
    """
    if sample_by not in _TEXT_ROWS:
        raise ConfigError(f"sample_by is {sample_by!r}; it can be {', '.join(_TEXT_ROWS)}")
    kind = source if isinstance(source, str) and source in _READERS else None
    named = _files_of_split(data_files, split)
    if kind and not named and not data_dir:
        raise ConfigError(f"source is {kind!r}, which needs data_files: a file, a glob or a list")
    if any("://" in file for file in named) or not (kind or _is_local(source)):
        options = {"data_files": data_files, "data_dir": data_dir, "revision": revision}
        return _hub_source(str(source), split, name=name, **options)
    folders = [source] if isinstance(source, str) else source
    paths = [
        Path("" if kind else folder, data_dir or "", file).expanduser()
        for folder in folders
        for file in named or [""]
    ]
    word, first, last = _parse_split(split)
    if isinstance(data_files, Mapping):
        word = "train"  # the mapping has said which files the split is
    files = [file for path in paths for file in _expand(path, word)]
    readers = [(file, _reader(file, kind, sample_by)) for file in files]
    identity = [[_identity(file) for file in files], first, last, sample_by, kind]
    read = partial(_slice, partial(_read_files, readers), first, last)
    return Source(json.dumps(identity), read)


def _files_of_split(data_files: DataFiles, split: str) -> list[str]:
    if isinstance(data_files, Mapping):
        name = _parse_split(split)[0]
        if name not in data_files:
            raise ConfigError(f"split is {split!r}, but data_files has {', '.join(data_files)}")
        data_files = data_files[name]
    return [data_files] if isinstance(data_files, str) else data_files or []


def _is_local(source: str | list[str]) -> bool:
    if not isinstance(source, str):
        return True
    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or path.suffix.lower() in _SUFFIXES
    return looks_local or glob.has_magic(source) or path.exists()


def _parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Return name, start and end of a split."""
    match = _SPLIT.fullmatch(split)
    if not match:
        raise ConfigError(
            f"split is {split!r}; it can be a name, or a name with a slice of numbers or percents: "
            "train, train[:1000], train[90%:]"
        )
    name, first, last = match.groups()
    return name, first, last


def _expand(path: Path, split: str) -> list[Path]:
    """Return the data files that a path or a glob stands for, sorted."""
    is_folder = path.is_dir()
    if is_folder:
        found = [each for each in path.rglob("*") if each.suffix.lower() in _SUFFIXES]
        hint = f": the folder has no {', '.join(_SUFFIXES)} file"
    else:
        found = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
        hint = did_you_mean(path.name, [each.name for each in path.parent.glob("*")])
    # Of a folder that is named, its own path says nothing; of a file or a glob, the file's name.
    names = {each: str(each.relative_to(path)) if is_folder else each.name for each in found}
    files = sorted(f for f in found if f.is_file() and not re.search(r"(^|/)\.", names[f]))
    if not files:
        raise ConfigError(f"there is no data file {path}{hint}; change the dataset's source")
    if split == "train" and not is_folder:
        return files  # what is asked for by name is taken whatever its name
    named = [file for file in files if _names_split(names[file], split)]
    if split == "train" and not named:
        others = [each for each in _SPLIT_WORDS if each != split]
        named = [f for f in files if not any(_names_split(names[f], other) for other in others)]
    if not named:
        raise ConfigError(
            f"split is {split!r}, but no file of {path} is named so; name another file, or "
            "take a part of the rows: train[90%:]"
        )
    return named


def _names_split(name: str, split: str) -> bool:
    words = re.findall("[a-z]+", name.lower())
    return not _SPLIT_WORDS.get(split, {split}).isdisjoint(words)


def _identity(file: Path) -> list[str | int]:
    """Return what changes when the rows of a file may have changed."""
    about = file.stat()
    if about.st_size > _HASHED:
        return [file.name, about.st_size, about.st_mtime_ns]
    try:
        with open(file, "rb") as content:
            return [file.suffix, hashlib.file_digest(content, "sha256").hexdigest()]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _slice(read: Callable[[], Iterator[Row]], first: str | None, last: str | None) -> Iterator[Row]:
    """Yield rows `first` to `last`; for a percent or a negative number, count them first."""
    bounds = first or "0", last or ""
    total = sum(1 for _ in read()) if re.search("[%-]", "".join(bounds)) else sys.maxsize
    start, stop, _ = slice(*(_row_number(bound, total) for bound in bounds)).indices(total)
    return islice(read(), start, stop)


def _row_number(bound: str, total: int) -> int | None:
    if bound.endswith("%"):
        return round(int(bound[:-1]) / 100 * total)
    return int(bound) if bound else None


def _read_files(readers: Iterable[tuple[Path, Callable[[Path], Numbered]]]) -> Iterator[Row]:
    for file, reader in readers:
        number = 0
        try:
            for number, values in reader(file):
                yield Row(f"{file}:{number}", values)
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            raise DataError(f"{file}:{number + 1}: {error}") from error


def _reader(file: Path, kind: str | None, sample_by: str) -> Callable[[Path], Numbered]:
    kind = kind or _SUFFIXES.get(file.suffix.lower())
    if kind is None:
        raise ConfigError(
            f"{file}: no data format is known by {file.suffix or 'no suffix'!r}; "
            f"known are {', '.join(_SUFFIXES)}"
        )
    return _TEXT_ROWS[sample_by] if kind == "text" else _READERS[kind]


def _json_rows(file: Path) -> Numbered:
    """Yield the objects of an array, or else one object per line."""
    with open(file, "rb") as lines:
        if lines.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from enumerate(_array_items(file), start=1)
            return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _json_line(line)


def _json_line(line: bytes) -> Any:
    """Return an object, or why the line is none, as an error: lines after it can still be read."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8: {error.reason}, at byte {error.start + 1} of the line")
    except (ValueError, RecursionError) as error:
        return DataError(
            f"not JSON: {error} (a file has one object per line, or is an array of objects)"
        )


def _array_items(file: Path) -> Iterator[Any]:
    """Yield the items of a JSON array; only about a chunk of the text is in memory."""
    decode = json.JSONDecoder().raw_decode
    with open(file, encoding="utf-8-sig") as text:
        buffer, line = text.read(_CHUNK), 1
        at = buffer.index("[") + 1
        while True:
            match = _SEPARATOR.match(buffer, at)
            at = match.end() if match else at
            if buffer.startswith("]", at):
                if rest := (buffer[at + 1 :] + text.read(_CHUNK)).strip():
                    raise ValueError(f"not JSON: after the array follows {rest[:40]!r}")
                return
            try:
                item, at = decode(buffer, at)
            except json.JSONDecodeError as error:
                # Perhaps the item only goes on; reading as much again each time keeps this linear.
                more = text.read(max(_CHUNK, len(buffer) - at))
                if not more:
                    line += buffer.count("\n", 0, error.pos)
                    raise ValueError(f"not JSON: {error.msg}, line {line} of the file") from error
                line += buffer.count("\n", 0, at)
                buffer, at = buffer[at:] + more, 0
                continue
            yield item


def _csv_rows(file: Path) -> Numbered:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    with open(file, encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, strict=True), start=1):
            if None in row:
                yield number, DataError(f"the row has more fields than the header: {row[None]}")
            else:
                yield number, row


def _parquet_rows(file: Path) -> Numbered:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as table:
        rows = (row for batch in table.iter_batches(1000) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)


def _lines(file: Path) -> Numbered:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}


def _paragraphs(file: Path) -> Numbered:
    """Yield stretches of lines without an empty one, each numbered by its first line."""
    first, paragraph = 1, ""
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                first = first if paragraph else number
                paragraph += line
            elif paragraph:
                yield first, {"text": paragraph.rstrip("\n")}
                paragraph = ""
    if paragraph:
        yield first, {"text": paragraph.rstrip("\n")}


def _document(file: Path) -> Numbered:
    yield 1, {"text": file.read_text(encoding="utf-8-sig")}


_TEXT_ROWS: dict[str, Callable[[Path], Numbered]] = {
    "line": _lines,
    "paragraph": _paragraphs,
    "document": _document,
}
_READERS: dict[str, Callable[[Path], Numbered]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "text": _lines,
}
_SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def _hub_source(source: str, split: str, **options: Any) -> Source:
    import datasets

    given = {key: value for key, value in options.items() if value is not None}
    try:
        data = datasets.load_dataset(source, split=split, **given)
    except Exception as error:  # those of its network, file and parser layers come through, too
        raise (UnreachableError if is_network(error) else DataError)(
            f"{source!r} is no local file or folder, and the hub does not give it: "
            f"{first_line(error)}; check the dataset's source, name and split, the network "
            "(HF_HUB_OFFLINE), and, if it is gated, HF_TOKEN"
        ) from error
    fingerprint: str | None = getattr(data, "_fingerprint", None)
    return Source(
        fingerprint and json.dumps([source, split, fingerprint]),
        lambda: (Row(f"{source} ({split}):{i}", row) for i, row in enumerate(data, start=1)),
    )
