"""The measured side: works in turns and tells what each took. Standard library only.

The measuring process starts all that it compares at once and then lets one at a time do one step,
so that whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

# With one thread the two are the same on an idle machine; on a busy one CPU time is what repeats.
clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter


class Turns:
    """One end of a socket, whose number is in BENCH_SOCKET."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=int(os.environ["BENCH_SOCKET"]))
        self._file = self._socket.makefile("rw")
        self._start: float | None = None

    def end(self, **values: Any) -> None:
        """Report this turn and wait for the next; leaves the process when there is none."""
        now = clock()
        seconds = None if self._start is None else now - self._start
        self._file.write(json.dumps({"seconds": seconds, "peak": peak_bytes(), **values}) + "\n")
        self._file.flush()
        if not self._file.readline():
            os._exit(0)  # without what a run does at its end: nothing of it is wanted
        self._start = clock()


def peak_bytes() -> int:
    """Return the most memory that this process has held so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


class TurnLogger:
    """A metric logger, for mytune's recipe and torchtune's: a logged step is a turn."""

    def __init__(self, **unused: Any) -> None:
        self._turns = Turns()

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self._turns.end(loss=float(payload["loss"]))

    def log_config(self, config: Any) -> None:
        pass

    def resume_at(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class Ids:
    """In the place of a tokenizer, for rows that are ids already."""

    pad_id = 0
    bos_id = 1
    eos_id = 2
    stop_tokens = (2,)
    special_tokens: ClassVar[dict[str, int]] = {}
    max_seq_len = None
    vocab_size = 0
    fingerprint = "ids"


class Rows:
    """Rows of ids, trained on from `trained_from`, as torchtune's recipes read them."""

    def __init__(self, tokenizer: Any = None, path: str = "") -> None:
        self.rows = list(read_rows(path))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens, trained_from = self.rows[index]
        return {"tokens": tokens, "labels": [-100] * trained_from + tokens[trained_from:]}


def read_rows(path: str) -> Iterator[tuple[list[int], int]]:
    """Read ids and the place of the first trained one."""
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        yield row["tokens"], row["trained_from"]
