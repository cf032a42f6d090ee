"""Batches: which rows belong to which step of which rank, and how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from mytune.datasets.tokens import IGNORE_INDEX, Dataset, Int32Array, IntArray, Sample
from mytune.errors import check_at_least

Batch: TypeAlias = dict[str, Tensor]


class BatchLoader:
    """The micro-batches of every optimizer step, as a pure function of epoch and step.

    The order of rows follows from seed and epoch alone. A step takes the next
    `batch_size * gradient_accumulation_steps * world_size` rows, of which each rank gets its share;
    all ranks get the same number of micro-batches. No row is dropped: the last step of an epoch may
    be smaller. Within a step, rows of like length share a micro-batch, which saves padding and
    leaves the sum over the step as it is.

    Args:
        shuffle: order rows anew in every epoch.
        max_steps_per_epoch: end an epoch after this many steps.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        shuffle: bool,
        pad_id: int,
        rank: int = 0,
        world_size: int = 1,
        max_steps_per_epoch: int | None = None,
    ) -> None:
        numbers = {
            "batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_steps_per_epoch": max_steps_per_epoch,
        }
        check_at_least(1, numbers)
        self.dataset, self.seed, self.shuffle, self.pad_id = dataset, seed, shuffle, pad_id
        self.rank, self.world_size = rank, world_size
        self._rows_per_micro_step = batch_size * world_size
        self._rows_per_step = self._rows_per_micro_step * gradient_accumulation_steps
        steps = -(-len(dataset) // self._rows_per_step)
        self.steps_per_epoch = min(steps, max_steps_per_epoch or steps)

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches for each step of an epoch, from step `start` on.

        Beside what `collate` gives, `rows` says which of the dataset's samples they are.
        """
        order = self._order(epoch)
        for step in range(start, self.steps_per_epoch):
            begin = step * self._rows_per_step
            yield self._micro_batches(order[begin : begin + self._rows_per_step])

    def _order(self, epoch: int) -> IntArray:
        if not self.shuffle:
            return np.arange(len(self.dataset))
        # Raw bits: numpy keeps them the same for ever, which it does not promise of permutation().
        bits = np.random.PCG64([self.seed, epoch]).random_raw(len(self.dataset))
        return np.argsort(bits, kind="stable")

    def _micro_batches(self, rows: IntArray) -> list[Batch]:
        """Cut a step's rows, longest first, into micro-steps; return this rank's share of each."""
        rows = rows[np.argsort(-self.dataset.lengths[rows], kind="stable")]
        starts = range(0, len(rows), self._rows_per_micro_step)
        micro_steps = [rows[start : start + self._rows_per_micro_step] for start in starts]
        return [self._batch(each[self.rank :: self.world_size]) for each in micro_steps]

    def _batch(self, rows: IntArray) -> Batch:
        samples = [self.dataset[int(row)] for row in rows] or [self._spare()]
        batch = collate(samples, self.pad_id, self.dataset.pad_to)
        return {**batch, "rows": torch.from_numpy(rows)}

    def _spare(self) -> Sample:
        """Return a sample of one masked token, for a rank that has no rows in the last step."""
        first = self.dataset[0]
        first["labels"].fill(IGNORE_INDEX)
        return cast(Sample, {key: cast(Int32Array, array)[:1] for key, array in first.items()})


def collate(samples: Sequence[Sample], pad_id: int, pad_to: int | None = None) -> Batch:
    """Pad samples on the right, to their longest or to `pad_to`: int64 [batch, seq].

    Padding has `pad_id`, label -100 and, in packs, position 0 and document -1.
    """
    padding = {"tokens": pad_id, "labels": IGNORE_INDEX, "positions": 0, "document_ids": -1}
    width = pad_to or max(len(sample["tokens"]) for sample in samples)
    batch = {}
    for key in samples[0]:
        padded = np.full((len(samples), width), padding[key], dtype=np.int64)
        for row, sample in zip(padded, samples, strict=True):
            row[: len(sample["tokens"])] = sample[key]  # type: ignore[literal-required]
        batch[key] = torch.from_numpy(padded)
    return batch


def count_targets(micro_batches: Sequence[Batch]) -> int:
    """Return the number of labels that are trained."""
    return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)
