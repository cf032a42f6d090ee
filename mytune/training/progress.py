"""What a person sees while a run goes: log lines, and progress that also reads well in a file."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

from mytune.config import redact
from mytune.errors import ConfigError, did_you_mean, printable
from mytune.training.distributed import rank

log = logging.getLogger("mytune")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_EVERY_SECONDS = 30


def setup_logging(level: str = "INFO", rank: int = 0) -> None:
    """Send the logger `mytune` to stderr: the message alone, or with its level from WARNING on.

    Ranks other than 0 say only errors. May be called again to change the level.
    """
    if level.upper() not in _LEVELS:
        hint = did_you_mean(level.upper(), _LEVELS)
        raise ConfigError(f"log_level is {level!r}{hint}; it can be {', '.join(_LEVELS)}")
    log.handlers[:] = [_Handler(f"[rank {rank}] " if rank else "")]
    log.setLevel(level.upper() if rank == 0 else logging.ERROR)
    log.propagate = False  # a library's basicConfig would print each line twice


class _Handler(logging.Handler):
    """Writes to stderr without secrets, and without tearing a progress bar."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = printable(redact(self.prefix + level + self.format(record)))
        with suppress(OSError):  # nobody reads it, or its disk is full: no reason to stop training
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()


class ProgressBar:
    """Steps done, loss and speed: a bar on a terminal, else a line every 30 s or 5 %.

    Shown on stderr, by rank 0 only. `done` steps were made by the run that this one resumes.
    """

    def __init__(self, total: int, done: int = 0, *, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr
        self.total, self.done = total, done
        self._start = self._last_time = time.monotonic()
        self._last_step = done
        self._bar = None
        if rank() == 0 and self.file.isatty():
            self._bar = tqdm(
                total=total, initial=done, unit="step", file=self.file, dynamic_ncols=True
            )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` steps are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", False)
            self._bar.update(step - self._bar.n)
        elif rank() == 0 and self._is_due(step):
            self._last_time, self._last_step = time.monotonic(), step
            self._print(step, loss, tokens_per_second)

    def _is_due(self, step: int) -> bool:
        return (
            step in (self.done + 1, self.total)
            or time.monotonic() - self._last_time >= _EVERY_SECONDS
            or step - self._last_step >= self.total / 20
        )

    def _print(self, step: int, loss: float, tokens_per_second: float) -> None:
        elapsed = time.monotonic() - self._start
        left = elapsed / (step - self.done) * (self.total - step)
        spent, rest = tqdm.format_interval(elapsed), tqdm.format_interval(left)
        # The first step warms up: what it took says nothing of those to come.
        rest = "" if step == self.done + 1 else f", {rest} left"
        with suppress(OSError):
            print(
                f"step {step}/{self.total} ({step / self.total:.0%})  loss {loss:.4f}  "
                f"{tokens_per_second:,.0f} tokens/s  {spent} elapsed{rest}",
                file=self.file,
                flush=True,
            )
