"""Ctrl-C while packages are imported: some swallow the exception."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from mytune._interrupts import ctrl_c_ends_at_once

SWALLOWS = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:  # as torch does in C++
    pass
def model(checkpoint_dir): print("imported by half")
"""


def test_it_is_not_swallowed(tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    words = ["run", "generate", "--config", "tiny/generation", "model._component_=swallows.model"]
    done = subprocess.run(
        [sys.executable, "-m", "mytune", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored here
    )
    assert (done.returncode, done.stdout) == (130, ""), done.stderr


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_the_handler_that_was_there_is_there_again(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with ctrl_c_ends_at_once():
            now = signal.getsignal(signal.SIGINT)
            assert (now is handler) == (handler is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
