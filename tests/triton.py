"""Triton's kernels in Triton's interpreter, on the CPU; `tests/gpu` runs them on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_in_interpreter(script: str) -> None:
    """Run a Python script whose kernels are interpreted; it asserts what it is about."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
