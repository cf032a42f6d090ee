"""A registry of its own for the tests of the command line, and `tune` called in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from mytune.cli import registry
from mytune.cli.main import main

RECIPE = '''"""A recipe that says what it was given, and ends as it is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

from mytune.cli import run_recipe
from mytune.errors import DataError, NumericalError, StoppedEarly


@dataclass(kw_only=True)
class Config:
    # Where results go.
    output_dir: str
    # How to end.
    end: str = "well"
    # Rows per batch.
    batch_size: int = 2


def say(text: str) -> None:
    os.write(1, f"{text}\\n".encode())  # in one piece: ranks share the pipe


def main(cfg: Config) -> int | None:
    rank, ranks = int(os.environ.get("RANK", 0)), os.environ.get("WORLD_SIZE", "1")
    say(f"rank {rank} of {ranks}: {cfg.output_dir} {cfg.batch_size}")
    match cfg.end:
        case "code":
            return 6
        case "data":
            raise DataError("rows.jsonl:3: no output", ["row 3", "row 4"])
        case "bug":
            return 1 // 0
        case "one rank":
            if rank == 1:
                raise NumericalError("the loss is nan")
            time.sleep(60)
        case "killed":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(2 if rank == 1 else 60)
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            stop = []
            signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
            say("waiting")
            while not stop:
                time.sleep(0.05)
            time.sleep(rank)
            raise StoppedEarly("saved step_3")
    return None


if __name__ == "__main__":
    raise SystemExit(run_recipe(__file__))
'''

CONFIG = "output_dir: out\nbatch_size: 4\n"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Undo after each test what a command leaves in this process; keep its temporary files."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    with mock.patch.dict(os.environ, TMPDIR=str(tmp_path / "tmp")):
        yield


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and a config that the registry takes for its own; not the cwd."""
    root, cwd = tmp_path / "root", tmp_path / "cwd"
    for folder in (root / "recipes", root / "configs" / "fam", cwd):
        folder.mkdir(parents=True)
    (root / "recipes" / "finetune.py").write_text(RECIPE)
    (root / "configs" / "fam" / "1B_lora_single_device.yaml").write_text(CONFIG)
    monkeypatch.setattr(registry, "ROOT", root)
    monkeypatch.chdir(cwd)
    return root


@pytest.fixture
def tune(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def call(*words: str) -> Ended:
        code = main(words)
        return Ended(code, *capfd.readouterr())

    return call


def start(*words: str, **options: object) -> subprocess.Popen[str]:
    """Start `python WORDS` with its output in pipes."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words], stdout=pipe, stderr=pipe, text=True, **options
    )  # type: ignore[call-overload,no-any-return]


def finish(process: subprocess.Popen[str], stdin: str | None = None) -> Ended:
    out, err = process.communicate(stdin, timeout=60)
    return Ended(process.returncode, out, err)
