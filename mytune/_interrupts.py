"""Ctrl-C while large packages are imported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ctrl_c_ends_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process with code 130 where there is nothing to lose yet.

    As an exception it would be lost: extension modules such as torch's import others in C++ and
    drop what these raise, and a package that is there by half fails much later.
    """
    before = signal.getsignal(signal.SIGINT)
    is_usual = before is signal.default_int_handler  # not ignored, and nobody else's
    if not is_usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(130)
