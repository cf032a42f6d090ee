"""What a command costs before it does its work: CPU seconds (user and system) and peak memory of a
process of its own, medians. The budget is 0.3 s above a Python that does nothing. `validate` is the
check of keys and types; that of components imports them, and so torch.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

from tests.benchmarks.common import TORCHTUNE_PYTHON, Row

TITLE = "Start-up of commands"
BUDGET = 0.3

CONFIG = "llama3/8B_lora_single_device"
OURS = "import sys; from mytune.cli.main import main; sys.exit(main())"
THEIRS = "import sys; from torchtune._cli.tune import main; sys.exit(main())"
KEYS_AND_TYPES = (
    "from mytune.cli import registry; from mytune.config import load_config; import sys;"
    "load_config(registry.recipe_for(sys.argv[1]), registry.find_config(sys.argv[1]))"
)
COMMANDS = {
    "tune --help": ["--help"],
    "tune ls": ["ls"],
    "tune cat": ["cat", CONFIG],
    "tune cp": ["cp", CONFIG, "copy.yaml"],
}


def measure(quick: bool) -> list[Row]:
    """Return a row per command: ours, and torchtune's where it is installed."""
    turns = 3 if quick else 9
    pythons = {"mytune": (sys.executable, OURS)}
    if TORCHTUNE_PYTHON:
        pythons["torchtune"] = (TORCHTUNE_PYTHON, THEIRS)
    rows = []
    for library, (python, script) in pythons.items():
        scripts = {command: ["-c", script, *words] for command, words in COMMANDS.items()}
        if library == "mytune":
            scripts["tune validate"] = ["-c", KEYS_AND_TYPES, CONFIG]
        empty, _ = cost([python, "-c", "pass"], turns)
        for command, words in scripts.items():
            seconds, memory = cost([python, *words], turns)
            rows.append(
                {
                    "command": command,
                    "library": library,
                    "CPU seconds": seconds,
                    "above an empty Python": seconds - empty,
                    "peak memory, MiB": memory,
                }
            )
    return rows


def cost(command: list[str], turns: int) -> tuple[float, float]:
    """Return CPU seconds and MiB of peak memory of a command, medians; RuntimeError if it fails."""
    said = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise RuntimeError(f"{command} ended with code {process.returncode}")
            said.append((used.ru_utime + used.ru_stime, used.ru_maxrss / 1024))
    seconds, memory = zip(*said, strict=True)
    return statistics.median(seconds), statistics.median(memory)
