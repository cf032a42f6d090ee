"""R7: the first signal asks, the second kills."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from mytune.training.signals import StopSignal

CHILD = """
import sys, time
from mytune.training.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("finishing", flush=True)
    time.sleep(float(sys.argv[1]))
print("saved", flush=True)
"""


def child(seconds: float, **env: str) -> subprocess.Popen[str]:
    import os

    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_the_step_finish(number):
    process = child(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (out, process.returncode) == ("finishing\nsaved\n", 0)
    assert err.strip().count("\n") == 0 and "stopping after this step" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number):
    process = child(30)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "finishing\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=5)
    assert (out, process.returncode) == ("", -number)


def test_torchrun_passing_on_a_ctrl_c_is_not_a_second_one():
    process = child(0.3, TORCHELASTIC_RUN_ID="none")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        line = process.stdout.readline()
    out, _ = process.communicate(timeout=5)
    assert (line, out, process.returncode) == ("saved\n", "", 0)


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.requested
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_another_thread_it_changes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
