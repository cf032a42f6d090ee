"""Stopping on request: the first signal lets a run finish its step and save, the second ends it."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from mytune.training.distributed import all_sum

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context in which SIGTERM or Ctrl-C sets `requested`, and a second one ends the process.

    Does nothing outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_any_rank(self) -> bool:
        """Say whether any rank has been asked to stop; every rank must call it."""
        return all_sum(float(self.requested)) > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            # Not print(): the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step, then saving; once more to stop at once\n")
        elif not self._is_echo():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _is_echo(self) -> bool:
        """Say whether this is torchrun passing on the Ctrl-C that the terminal sent us, too."""
        return "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._since < 1.0
