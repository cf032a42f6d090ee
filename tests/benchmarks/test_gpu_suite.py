"""The GPU suite where there is no GPU: what it counts, and how it goes on after a failure."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mytune.models.llama3 import LLAMA3_8B
from tests.gpu.bench import Suite, aligned
from tests.gpu.flops import flop_per_token


def test_work_per_token_is_that_of_the_closed_form() -> None:
    """4 or 6 FLOP for each of 7.505e9 parameters in products, 3.5 x 262,144 x 4096 of attention."""
    assert flop_per_token(LLAMA3_8B, 4096, "full") == pytest.approx(48.79e9, rel=1e-3)
    assert flop_per_token(LLAMA3_8B, 4096, 16) == pytest.approx(34.03e9, rel=1e-3)


def test_a_case_without_memory_or_time_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    suite = Suite(seconds=60)
    suite.run("gpu_nf4", {"library": "a"}, lambda: {"library": "a", "GB/s": 2.0})
    suite.run("gpu_nf4", {"library": "b"}, fail)
    monkeypatch.setattr(suite, "_end", 0.0)
    suite.run("gpu_nf4", {"library": "c"}, fail)
    assert aligned(suite.tables["gpu_nf4"]) == [
        {"library": "a", "GB/s": 2.0, "result": "measured"},
        {"library": "b", "GB/s": None, "result": "out of memory"},
        {"library": "c", "GB/s": None, "result": "no time left"},
    ]


def test_decoding_is_measured() -> None:
    script = (
        "from tests.gpu.others import decode; print(*("
        "decode(weights, {'compile': True}, 1e9)['tokens/s'] > 0"
        " for weights in ('bf16', 'Int8WeightOnlyQuantizer')))"
    )
    done = run_tiny("-c", script)
    assert done.stdout.splitlines()[-1:] == ["True True"], done.stderr


def test_training_is_measured() -> None:
    script = (
        "from tests.gpu.training import Case, measure; print(*("
        "measure(Case(method, 64, 'none', document=document), 1e9)['result']"
        " for method, document in (('full', None), ('QLoRA', 16))))"
    )
    done = run_tiny("-c", script)
    assert done.stdout.splitlines()[-1:] == ["measured measured"], done.stdout + done.stderr


def run_tiny(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python for the suite in its tiny size, on a CPU."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "MYTUNE_GPU_SUITE_ON": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_suite_ends_with_tables_and_says_what_it_left_out() -> None:
    done = run_tiny("-m", "tests.gpu.bench", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| no time left |") >= 25
    assert "| LoRA | 2 x 4096 | compile | no time left |" in done.stdout
