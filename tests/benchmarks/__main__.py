"""Run benchmarks and write docs/benchmarks/results.json and the tables of docs/performance.md.

python -m tests.benchmarks [--quick] [--machine SUFFIX] [NAME ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from tests.benchmarks.common import REPOSITORY, Row, machine, table

RESULTS = REPOSITORY / "docs" / "benchmarks" / "results.json"
PAGE = REPOSITORY / "docs" / "performance.md"


def main() -> int:
    """Run the benchmarks named on the command line, or all, each in a process of its own."""
    names = sorted(file.stem[len("bench_") :] for file in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="fewer turns and cases")
    parser.add_argument(
        "--machine",
        metavar="SUFFIX",
        default="",
        help="keep the tables that there are, and add some of this machine: NAME_SUFFIX",
    )
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if len(args.names) == 1:
        measure(args.names[0], args.quick, args.machine)
        return 0
    command = [sys.executable, "-m", "tests.benchmarks", f"--machine={args.machine}"]
    command += ["--quick"] if args.quick else []
    codes = [
        subprocess.run([*command, name], check=False).returncode for name in args.names or names
    ]
    return max(codes)


def measure(name: str, quick: bool, suffix: str) -> None:
    """Run a benchmark and write what it found."""
    bench = importlib.import_module(f"tests.benchmarks.bench_{name}")
    start = time.perf_counter()
    rows = bench.measure(quick)
    print(f"\n{bench.TITLE} ({time.perf_counter() - start:.0f} s)\n\n{table(rows)}", flush=True)
    where = {"date": time.strftime("%Y-%m-%d"), **machine()}
    name = f"{name}_{suffix}" if suffix else name
    write_results(name, rows, where)
    write_page(name, bench, rows, where)


def write_results(name: str, rows: list[Row], where: Row) -> None:
    """Put a benchmark's rows, and where they were measured, into the results file."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {"machine": where, "rows": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def write_page(name: str, bench: ModuleType, rows: list[Row], where: Row) -> None:
    """Put a benchmark's description and table between its markers in the page, or at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    note = "; ".join(f"{key} {_plain(value)}" for key, value in where.items())
    section = f"{begin}\n{bench.__doc__}\n{table(rows)}\n\nMeasured with: {note}.\n{end}"
    page = PAGE.read_text() if PAGE.exists() else "# Performance\n"
    if begin not in page:
        page += f"\n## {bench.TITLE}\n\n{begin}\n{end}\n"
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    PAGE.write_text(re.sub(pattern, lambda _: section, page, flags=re.DOTALL))


def _plain(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {version}" for key, version in value.items())


if __name__ == "__main__":
    sys.exit(main())
