"""Work cut into batches, dealt to the ranks, and its results brought together on each of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from mytune.errors import ConfigError, is_out_of_memory
from mytune.modules.decoder import Decoder
from mytune.training.distributed import gather_objects, rank, world_size
from mytune.training.sharding import is_sharded
from mytune.training.signals import StopSignal

log = logging.getLogger("mytune")

# Tokens of a forward when batch_size is auto: a CPU gains nothing from more.
_AUTO = {"cpu": 4096}
_AUTO_ELSEWHERE = 32768

Item = TypeVar("Item")
Result = TypeVar("Result")


class EvaluationStopped(Exception):
    """The run was asked to stop: what has been evaluated so far is of no use."""


def check_batch_size(batch_size: int | str) -> None:
    """Raise ConfigError unless it is a number of rows or "auto"."""
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigError(f"batch_size is {batch_size!r}; it must be 1 or more, or auto")


def cut(
    items: Sequence[Item],
    length: Callable[[Item], int],
    batch_size: int | str,
    device: torch.device,
) -> list[list[Item]]:
    """Return items, which come longest first, in batches of `batch_size` or so many tokens."""
    most = _AUTO.get(device.type, _AUTO_ELSEWHERE)
    batches: list[list[Item]] = []
    rows = 0
    for item in items:
        if not batches or len(batches[-1]) == rows:
            rows = int(most // length(item) or 1 if batch_size == "auto" else batch_size)
            batches.append([])
        batches[-1].append(item)
    return batches


def run_batches(
    batches: Sequence[list[Item]],
    work: Callable[[list[Item]], Mapping[int, Result]],
    description: str,
    model: Decoder,
    *,
    stop: StopSignal | None = None,
) -> dict[int, Result]:
    """Return what `work` finds in all batches, by the keys it gives, on every rank.

    Ranks take turns, so that each gets long and short ones. All do the same number of batches, as
    sharded models demand: who has one less repeats the first. The batches are those of one process,
    and so are the results, to the bit.

    Raises:
        EvaluationStopped: between two batches, if `stop` was requested on any rank.
    """
    if not batches:
        return {}
    mine = batches[rank() :: world_size()]
    turns = -(-len(batches) // world_size())
    results: dict[int, Result] = {}
    often = 0.1 if sys.stderr.isatty() else 30.0  # seconds; in a file each is a line
    hidden, sharded = rank() > 0, is_sharded(model)
    with tqdm(total=turns, desc=description, mininterval=often, disable=hidden) as bar:
        for turn in range(turns):
            if stop and stop.on_any_rank():
                raise EvaluationStopped
            batch = mine[turn] if turn < len(mine) else batches[0]
            # Halves would be forwards that the other ranks of a sharded model do not take part in.
            results |= work(batch) if sharded else _in_memory(batch, work)
            bar.update()
    return {key: value for part in gather_objects(results) for key, value in part.items()}


def _in_memory(
    batch: list[Item], work: Callable[[list[Item]], Mapping[int, Result]]
) -> Mapping[int, Result]:
    """Do a batch, or its halves if the device's memory does not suffice."""
    try:
        return work(batch)
    except (RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
    log.warning("a batch of %d does not fit into memory: its halves are tried", len(batch))
    torch.cuda.empty_cache()  # does nothing elsewhere
    half = len(batch) // 2
    return {**_in_memory(batch[:half], work), **_in_memory(batch[half:], work)}
