"""Several rows in one sample: packs planned from lengths alone; and several datasets in one."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from math import ceil

import numpy as np

from mytune.datasets.tokens import Dataset, IntArray, Sample, Stats, TokenDataset
from mytune.errors import ConfigError


class PackedDataset:
    """Rows put together to samples of at most `max_seq_len` tokens.

    Each row is a document of its own: its positions start at 0, its number is in `document_ids`,
    and no label leads from one row to the next.

    Args:
        max_seq_len: room of a pack.
        split_across_pack: cut the stream of all rows into blocks, each full but the last; a row
            that is cut goes on as a new document, and the token before the cut still learns the
            one after it. If False, no row is cut.
    """

    def __init__(
        self, ds: TokenDataset, max_seq_len: int | None, split_across_pack: bool = False
    ) -> None:
        if not max_seq_len:
            raise ConfigError(
                "packed=True needs to know how long a pack is: set tokenizer.max_seq_len, e.g. 4096"
            )
        if not split_across_pack and ds.lengths.max() > max_seq_len:
            raise ConfigError(
                f"a row of {ds.lengths.max():,} tokens does not fit into packs of {max_seq_len:,}: "
                "truncate rows with tokenizer.max_seq_len, or set split_across_pack"
            )
        self.ds, self.pad_to, self.split = ds, max_seq_len, split_across_pack
        self._ends = np.cumsum(ds.lengths)
        if not split_across_pack:
            self._order, self._starts = plan_packs(ds.lengths, max_seq_len)
        settings = f"{ds.fingerprint} {max_seq_len} {split_across_pack}"
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()
        self.stats = replace(ds.stats, slots=len(self) * max_seq_len)

    def __len__(self) -> int:
        if self.split:
            return ceil(int(self._ends[-1]) / self.pad_to)
        return len(self._starts) - 1

    @cached_property
    def lengths(self) -> IntArray:
        """Tokens in each pack."""
        lengths: IntArray
        if self.split:
            blocks = np.arange(len(self) + 1) * self.pad_to
            lengths = np.diff(np.minimum(blocks, self._ends[-1]))
        else:
            lengths = np.add.reduceat(self.ds.lengths[self._order], self._starts[:-1])
        return lengths

    def __getitem__(self, index: int) -> Sample:
        """Return a pack."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        pieces = [self.ds.piece(*piece) for piece in self._pieces(index)]
        lengths = [len(piece["tokens"]) for piece in pieces]
        return {
            "tokens": np.concatenate([piece["tokens"] for piece in pieces]),
            "labels": np.concatenate([piece["labels"] for piece in pieces]),
            "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            "document_ids": np.repeat(np.arange(len(pieces), dtype=np.int32), lengths),
        }

    def _pieces(self, index: int) -> list[tuple[int, int, int]]:
        """Return (row, start, stop) of each part of a pack."""
        if not self.split:
            rows = self._order[self._starts[index] : self._starts[index + 1]]
            return [(int(row), 0, int(self.ds.lengths[row])) for row in rows]
        begin = index * self.pad_to
        end = min(begin + self.pad_to, int(self._ends[-1]))
        first, last = np.searchsorted(self._ends, (begin, end - 1), side="right")
        starts = self._ends[first : last + 1] - self.ds.lengths[first : last + 1]
        return [
            (row, max(begin - start, 0), min(end, int(self._ends[row])) - start)
            for row, start in enumerate(starts.tolist(), start=int(first))
        ]


def plan_packs(lengths: IntArray, room: int) -> tuple[IntArray, IntArray]:
    """Share out rows to few packs; return the rows pack by pack, and where packs start (and end).

    Best fit, longest rows first, done for all rows of a length and all packs with the same space at
    once, so the time depends on `room` more than on the number of rows. Within a pack, rows keep
    their order; packs are in the order of their first rows.

    Args:
        lengths: [n], each 1 to `room`.
    """
    by_length = np.argsort((room - lengths).astype(np.min_scalar_type(room)), kind="stable")
    counts = np.bincount(lengths, minlength=room + 1)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    open_packs = _OpenPacks()
    done = total = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        todo = done + int(counts[length])
        while done < todo:
            space, packs = open_packs.tightest(length)
            if packs is None:
                space = room
                packs = np.arange(total, total + ceil((todo - done) / (room // length)))
                total += len(packs)
            each = space // length
            filled = min(len(packs), (todo - done) // each)
            pack_of[by_length[done : done + filled * each]] = np.repeat(packs[:filled], each)
            open_packs.put(space - each * length, packs[:filled])
            done += filled * each
            rest = packs[filled:]
            if len(rest) and done < todo:  # fewer rows are left than the next pack has room for
                pack_of[by_length[done:todo]] = rest[0]
                open_packs.put(space - (todo - done) * length, rest[:1])
                done, rest = todo, rest[1:]
            open_packs.put(space, rest)
    return _in_order(pack_of, total)


class _OpenPacks:
    """Packs by the space that is left in them."""

    def __init__(self) -> None:
        self._spaces: list[int] = []  # sorted
        self._packs: dict[int, list[IntArray]] = {}

    def put(self, space: int, packs: IntArray) -> None:
        if not space or not len(packs):
            return
        if space not in self._packs:
            insort(self._spaces, space)
            self._packs[space] = []
        self._packs[space].append(packs)

    def tightest(self, length: int) -> tuple[int, IntArray | None]:
        """Take out the packs with the least space that `length` fits into; None: there are none."""
        at = bisect_left(self._spaces, length)
        if at == len(self._spaces):
            return 0, None
        space = self._spaces.pop(at)
        return space, np.concatenate(self._packs.pop(space))


def _in_order(pack_of: IntArray, total: int) -> tuple[IntArray, IntArray]:
    """Number the packs by their first rows; return rows by pack, and where packs start."""
    first = np.empty(total, dtype=np.int64)
    first[pack_of[::-1]] = np.arange(len(pack_of))[::-1]  # of several values the last one stays
    number = np.empty(total, dtype=np.int64)
    number[np.argsort(first)] = np.arange(total)
    pack_of = number[pack_of]
    sizes = np.bincount(pack_of, minlength=total)
    return np.argsort(pack_of, kind="stable"), np.concatenate(([0], np.cumsum(sizes)))


class ConcatDataset:
    """Datasets one after the other; shuffling goes over all of them. All are packed, or none."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        if not datasets:
            raise ConfigError("the list of datasets is empty; give at least one")
        limits = [dataset.pad_to for dataset in datasets]
        if None in limits and any(limits):
            raise ConfigError(
                "of the datasets in a list some are packed, some not; set packed alike for all"
            )
        self.datasets = list(datasets)
        self.pad_to = max((limit for limit in limits if limit), default=None)
        self.lengths = np.concatenate([dataset.lengths for dataset in datasets])
        prints = " ".join(dataset.fingerprint for dataset in datasets)
        self.fingerprint = hashlib.sha256(prints.encode()).hexdigest()
        self.stats = _sum([dataset.stats for dataset in datasets])
        self._ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[which][index - int(self._ends[which]) + len(self.datasets[which])]


def _sum(stats: Sequence[Stats]) -> Stats:
    numbers = [f.name for f in fields(Stats) if f.name != "first_skipped"]
    totals = {name: sum(getattr(each, name) for each in stats) for name in numbers}
    return Stats(**totals, first_skipped=next((s.first_skipped for s in stats if s.skipped), ""))
