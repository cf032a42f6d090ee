"""What benchmarks share: processes that take turns, medians of ratios, the machine, tables."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
PACKAGES = ("torch", "transformers", "peft", "lm_eval", "torchtune", "torchao", "bitsandbytes")
TORCHTUNE_PYTHON = os.environ.get("TORCHTUNE_PYTHON")
NO_TORCHTUNE = (
    "torchtune was not measured: TORCHTUNE_PYTHON names no Python that has it "
    "(python -m venv tt && tt/bin/pip install torch==2.13.0 torchtune==0.6.1 torchao==0.15.0)"
)

Row = dict[str, Any]


class Peer:
    """A process that does one step when told to and then waits; see `peers/turns.py`."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name.replace(' ', '_')}.log"
        ours, theirs = socket.socketpair()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment(BENCH_SOCKET=str(theirs.fileno())),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        ours.settimeout(600)
        self._file = ours.makefile("rw")
        ours.close()

    def wait(self) -> Row:
        """Return what the process says at the end of its turn.

        Raises:
            RuntimeError: it ended instead; the message holds the end of what it printed.
        """
        line = self._file.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise RuntimeError(f"{self.name} ended before its turn did:\n{tail}")
        answer: Row = json.loads(line)
        return answer

    def turn(self) -> Row:
        """Let the process do a step."""
        self._file.write("go\n")
        self._file.flush()
        return self.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._process.kill()
        self._process.wait()


def environment(**more: str) -> dict[str, str]:
    """Return the environment of every measured process: pinned threads, no network."""
    threads = {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "MKL")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet = {"OMP_WAIT_POLICY": "passive", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **threads, **offline, **quiet, **more}


def take_turns(
    commands: Mapping[str, Sequence[str]], folder: Path, turns: int, warm_up: int = 1
) -> dict[str, list[Row]]:
    """Run processes in turns; return what each said: first before any turn, then of each timed one.

    Args:
        commands: the command of each process, by name.
        folder: where what they print goes.
        turns: timed turns of each.
        warm_up: turns before them, which are left out.
    """
    with ExitStack() as stack:
        peers = [
            stack.enter_context(Peer(name, command, folder)) for name, command in commands.items()
        ]
        answers = {peer.name: [peer.wait()] for peer in peers}
        for turn in range(warm_up + turns):
            first = turn % len(peers)  # nobody is always the first after a pause
            for peer in peers[first:] + peers[:first]:
                answers[peer.name].append(peer.turn())
    return {name: said[:1] + said[1 + warm_up :] for name, said in answers.items()}


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of theirs / ours, turn by turn: how many times as fast we are."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def machine() -> Row:
    """Return where and with what was measured."""
    cpus = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in cpus.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "python": platform.python_version(),
        "versions": versions(sys.executable),
        "torchtune's versions": versions(TORCHTUNE_PYTHON) if TORCHTUNE_PYTHON else NO_TORCHTUNE,
    }


def versions(python: str, packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those of `packages` that a Python has."""
    script = (
        "import json; from importlib.metadata import distributions;"
        "print(json.dumps({d.name: d.version for d in distributions()}))"
    )
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    installed: dict[str, str] = json.loads(done.stdout)
    return {name: installed[name] for name in packages if name in installed}


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table, numbers to three digits."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([_cell(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)
