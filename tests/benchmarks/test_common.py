"""The benchmarks run; their instruments: processes that take turns, and what answers become."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks import bench_generation, bench_training
from tests.benchmarks.common import median_ratio, table, take_turns
from tests.benchmarks.model import SHAPES, Shape

COUNTER = """
from tests.benchmarks.peers.turns import Turns
turns = Turns()
for number in range({steps}):
    print("step", number, flush=True)
    turns.end(number=number)
"""


def counter(steps: int) -> list[str]:
    return [sys.executable, "-c", COUNTER.format(steps=steps)]


def test_processes_take_turns_and_the_warm_up_is_left_out(tmp_path: Path) -> None:
    answers = take_turns({"a": counter(9), "b": counter(9)}, tmp_path, turns=2, warm_up=1)
    for said in answers.values():
        assert [row["number"] for row in said] == [0, 2, 3]
        assert said[0]["seconds"] is None
        assert all(row["seconds"] >= 0 and row["peak"] > 2**20 for row in said[1:])


def test_a_process_that_ends_early_is_an_error_with_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"b ended before its turn did:\nstep 0"):
        take_turns({"a": counter(9), "b": counter(1)}, tmp_path, turns=2)


def test_ratio_is_of_turns_and_not_of_sums() -> None:
    assert median_ratio([1.0, 1.0, 100.0], [2.0, 3.0, 100.0]) == 2.0


def test_table_has_a_heading_and_three_digits() -> None:
    assert table([{"name": "x", "speed": 1234.5678, "ratio": 0.12345, "absent": None}]) == (
        "| name | speed | ratio | absent |\n| --- | --- | --- | --- |\n| x | 1,235 | 0.123 | - |"
    )


@pytest.mark.parametrize(
    ("bench", "case"),
    [(bench_training, ("LoRA", "fp32")), (bench_generation, ("fp32", 2))],
)
def test_a_tiny_case_is_measured(
    bench: ModuleType,
    case: tuple[str, str | int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(512, 2, 4, 2, 64, 128))
    monkeypatch.setattr(bench, "TORCHTUNE_PYTHON", None)
    rows = list(bench.measure_case(tmp_path, "tiny", *case, turns=1))
    assert {"mytune", "transformers"} <= {row["library"] for row in rows}
    assert all(row["tokens/s"] > 0 for row in rows)
