"""Pages that are run: their files written, commands and snippets run, in order, in one folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mytune.cli.main import main
from tests.docs.pages import Block, Page


class Runner:
    """Runs the blocks of a page in the current folder.

    Args:
        everything: run all `bash` blocks, not only those with the comment `run`.
    """

    def __init__(self, page: Page, capfd: pytest.CaptureFixture[str], everything: bool) -> None:
        self.page, self.capfd, self.everything = page, capfd, everything
        self.names = {"__name__": "a_page"}  # what its snippets share
        self.code = 0  # of the last command
        self.output = ""  # of the last block that was run

    def run(self) -> None:
        """Run all blocks that are to be run."""
        for block in self.page.blocks:
            self._run(block)

    def _run(self, block: Block) -> None:
        where = f"{self.page}:{block.line}"
        if name := block.note("file:"):
            file = Path(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "bash" and (self.everything or block.note("run") is not None):
            self.output = shell(block.text, where)
        elif block.language == "console":
            for words, expected in dialogues(block):
                printed = self._command(words)
                assert matches(expected, printed), f"{where}: {words} printed\n{printed}"
        elif block.language == "python" and block.note("not run") is None:
            code = compile(block.text, where, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, self.names)
            self.output = printed.getvalue()
        if block.note("output of") is not None:
            assert_in_order(block.lines, self.output, where)

    def _command(self, words: list[str]) -> str:
        """Run a command of a `console` block in this process; return what it printed."""
        if words == ["echo", "$?"]:
            return f"{self.code}\n"
        assert words[0] == "tune", f"a console block runs tune and echo $?, not {words}"
        self.capfd.readouterr()
        self.code = main(words[1:])
        return "".join(self.capfd.readouterr())


def shell(text: str, where: str) -> str:
    """Run a script with this environment's `tune`; return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{where} ended with code {done.returncode}:\n{done.stdout}"
    return done.stdout


def dialogues(block: Block) -> list[tuple[list[str], str]]:
    """Return the commands of a `console` block as words, each with what it should print."""
    found: list[tuple[list[str], str]] = []
    for line in block.lines:
        if line.startswith("$ "):
            found.append((shlex.split(line[2:]), ""))
        else:
            words, expected = found[-1]
            found[-1] = (words, f"{expected}{line}\n")
    return found


def matches(expected: str, printed: str) -> bool:
    """Compare texts; `...` in the expected one stands for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.rstrip().split("..."))
    return re.fullmatch(pattern, printed.rstrip(), re.DOTALL) is not None


def assert_in_order(lines: list[str], output: str, where: str) -> None:
    """Demand that the lines, but for their numbers, are in the output in this order."""
    printed = iter(_without_numbers(output).splitlines())
    for line in lines:
        wanted = _without_numbers(line)
        assert wanted in printed, f"{where}: {line!r} is not, or not there, in\n{output}"


def _without_numbers(text: str) -> str:
    return re.sub(r"\d[\d,.]*", "#", text)
