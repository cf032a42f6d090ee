"""Greedy continuation of prompts of 64 ids by 64 more, one row or several, on the same random
Llamas: mytune, torchtune with its KV cache, transformers. In float32 all must give the same ids.
They run at once and take turns, one batch each; times are CPU seconds where there is one thread.
Tokens per second count the new tokens of all rows over prefill and decoding together. The last
column is mytune's time for the last 64 of 512 tokens over that for the first 64: with a KV cache it
is near 1, but attention reads 9 times as many keys. mytune has its memory in huge pages, as
`tune run generate` and `tune chat` begin on Linux; there are also figures of mytune in small pages
and of torchtune in huge ones.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from mytune.cli.huge_pages import SETTING, TUNABLES
from tests.benchmarks.common import NO_TORCHTUNE, TORCHTUNE_PYTHON, Row, median_ratio, take_turns
from tests.benchmarks.model import DTYPES, SHAPES, Shape, write_model

TITLE = "Generation"
PROMPT = 64
NEW = 64
ROWS = (1, 8)


def measure(quick: bool) -> list[Row]:
    """Return a row per shape, dtype and library."""
    if not TORCHTUNE_PYTHON:
        print(NO_TORCHTUNE)
    turns = 3 if quick else 7
    shapes = ["wide"] if quick else list(SHAPES)
    found: list[Row] = []
    for shape, dtype, rows in product(shapes, DTYPES, ROWS):
        with tempfile.TemporaryDirectory() as folder:
            found += measure_case(Path(folder), shape, dtype, rows, turns)
    return found


def measure_case(folder: Path, shape: str, dtype: str, rows: int, turns: int) -> Iterator[Row]:
    """Compare all libraries in one case."""
    write_model(folder / "model", SHAPES[shape])
    answers = take_turns(commands(folder, SHAPES[shape], dtype, rows), folder, turns)
    ids = {name: said[-1]["ids"] for name, said in answers.items()}
    if dtype == "fp32":
        assert all(found == ids["mytune"] for found in ids.values()), ids
    seconds = {name: [turn["seconds"] for turn in said[1:]] for name, said in answers.items()}
    for name, said in answers.items():
        yield {
            "model": shape,
            "dtype": dtype,
            "rows": rows,
            "library": name,
            "tokens/s": rows * NEW / statistics.median(seconds[name]),
            "mytune is x times as fast": median_ratio(seconds["mytune"], seconds[name]),
            "peak MB": said[-1]["peak"] / 1e6,
            "last / first tokens": said[0].get("flat"),
        }


def commands(folder: Path, shape: Shape, dtype: str, rows: int) -> dict[str, Sequence[str]]:
    """Return the command of every library that is there."""
    draw = random.Random(0)
    settings = {
        "model": str(folder / "model"),
        "shape": shape.arguments(),
        "dtype": DTYPES[dtype],
        "prompts": [
            [draw.randrange(3, shape.vocab_size) for _ in range(PROMPT)] for _ in range(rows)
        ],
        "new_tokens": NEW,
    }
    pythons = {
        "mytune": sys.executable,
        "torchtune": TORCHTUNE_PYTHON,
        "transformers": sys.executable,
    }
    found = {
        name: [python, "-m", f"tests.benchmarks.peers.{name}_generate", json.dumps(settings)]
        for name, python in pythons.items()
        if python
    }
    if sys.platform == "linux":
        huge = {name: ["env", f"{TUNABLES}={SETTING}", *found[name]] for name in found}
        found |= {"mytune": huge["mytune"], "mytune, small pages": found["mytune"]}
        if "torchtune" in huge:
            found["torchtune, huge pages"] = huge["torchtune"]
    return found
