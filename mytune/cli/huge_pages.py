"""Memory in huge pages for commands that only read weights: a CPU reads them faster so.

Decoding is up to 1.3 times as fast ("Generation" in docs/performance.md). Operators of torch that
lay out weights allocate them by glibc, which reads its settings once, when a process begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mytune.errors import TuneError

TUNABLES, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def restart_with_huge_pages(words: Sequence[str]) -> None:
    """Start this process once more, with huge pages, if its command line trains nothing.

    Only on Linux, and not in a program that calls `main`; what the user has set for glibc stays.
    """
    if sys.platform != "linux" or TUNABLES in os.environ:
        return
    if _is_tune() and _only_reads(words):
        variables = os.environ | {TUNABLES: SETTING}
        with suppress(OSError):  # such as a Python that has been removed
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)


def _is_tune() -> bool:
    """Say whether this process was started as `tune` or `python -m mytune`, with its arguments."""
    program = Path(sys.argv[0])
    is_ours = program.name == "tune" or program.parts[-2:] == ("mytune", "__main__.py")
    return is_ours and sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :] == sys.argv[1:]


def _only_reads(words: Sequence[str]) -> bool:
    if words[:1] == ["chat"]:
        return True
    if words[:1] != ["run"]:
        return False
    from mytune.cli import registry, run
    from mytune.config.schema import read_schema

    with suppress(TuneError, OSError):  # it is told later
        for recipe in run.split(words[1:])[1][:1]:
            return "optimizer" not in read_schema(registry.find_recipe(recipe)).names
    return False
