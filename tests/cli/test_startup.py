"""What a command may cost before it does its work."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.bench_startup import BUDGET, COMMANDS, CONFIG, KEYS_AND_TYPES, OURS, cost
from tests.cli.conftest import finish, start

HEAVY = {"torch", "transformers", "datasets", "numpy", "huggingface_hub"}
NAMES_ONLY = HEAVY | {
    "logging",
    "omegaconf",
    "yaml",
    "asyncio",
    "importlib.metadata",
    "dataclasses",
    "inspect",
}


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], NAMES_ONLY),
        (["ls"], NAMES_ONLY),
        (["cp", "lora_finetune_single_device", "x.py"], NAMES_ONLY),
        (["cp", CONFIG, "x.yaml"], HEAVY),
        (["cat", CONFIG], HEAVY),
        (["validate", "x.yaml", "no_such_key=1", "--recipe", "plain.py"], HEAVY),
        (["download", "--help"], HEAVY),
        (["run", "--help"], HEAVY),
    ],
)
def test_no_command_imports_what_it_does_not_need(tmp_path, monkeypatch, words, unwanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("number: 1\n")
    (tmp_path / "plain.py").write_text("class Config:\n    number: int\n")
    script = "import sys; from mytune.cli.main import main; main(); print(*sys.modules)"
    ended = finish(start("-c", script, *words))
    assert unwanted & set(ended.out.splitlines()[-1].split()) == set()


def test_start_up_stays_in_its_budget():
    empty, _ = cost([sys.executable, "-c", "pass"], turns=3)
    commands = {name: ["-c", OURS, *words] for name, words in COMMANDS.items()}
    commands["keys and types"] = ["-c", KEYS_AND_TYPES, CONFIG]
    seconds = {name: cost([sys.executable, *c], turns=3)[0] - empty for name, c in commands.items()}
    # On cores that are shared, CPU time doubles; importing torch would cost six times the budget,
    # and the benchmark holds it exactly.
    assert {name: each for name, each in seconds.items() if each > 2 * BUDGET} == {}
