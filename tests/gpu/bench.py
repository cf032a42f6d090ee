"""Measure training, decoding, NF4 and checkpoints on one GPU: `python -m tests.gpu.bench`.

Writes docs/benchmarks/gpu.json and the tables of docs/performance.md. The most telling cases come
first; when the time is up the rest is left out and says so. A case that runs out of memory is a
row that says so. How to read the numbers stands above each table: the docstrings below.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as `tune run` does
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "0")  # its kernels are wanted here

import torch

from tests.benchmarks.__main__ import write_page
from tests.benchmarks.common import REPOSITORY, Row, table, versions
from tests.gpu import DEVICE, HERE, NO_CUDA, TINY, others, training
from tests.gpu.flops import copy_rate, product_rate

RESULTS = REPOSITORY / "docs" / "benchmarks" / "gpu.json"
SECONDS = 420
DECODING: list[tuple[str, dict[str, Any]]] = [
    ("bf16", {"compile": True}),
    ("Int8WeightOnlyQuantizer", {"compile": True}),
    ("Int4WeightOnlyQuantizer", {"compile": True}),
    ("bf16", {}),
]


class Suite:
    """Runs cases until the time is up, and keeps what they found, table by table.

    After every case all is written to `results`: a run that is cut off loses no more than a case.
    """

    def __init__(self, seconds: float, results: Path | None = None) -> None:
        self._end = time.perf_counter() + seconds
        self._results = results
        self.where: Row = {}
        self.tables: dict[str, list[Row]] = {name: [] for name in ABOUT}

    def run(self, name: str, case: Row, work: Callable[[], Row | list[Row]]) -> None:
        """Do a case's work; its row is `case` and why there is no more, if it fails."""
        if time.perf_counter() > self._end:
            self._add(name, {**case, "result": "no time left"})
            return
        start, rows = time.perf_counter(), []
        problem = training.attempt(lambda: rows.append(work()))
        training.attempt(others.tidy)  # which a broken device cannot
        found = rows[0] if rows else {**case, "result": problem}
        for row in found if isinstance(found, list) else [found]:
            self._add(name, row)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)

    def _add(self, name: str, row: Row) -> None:
        self.tables[name].append({"result": "measured", **row})
        print(f"{name}: {row}", flush=True)
        if self._results:
            text = json.dumps({"machine": self.where, **self.tables}, indent=1)
            self._results.write_text(text + "\n")


def measure(suite: Suite) -> None:
    """Measure the rates of the device, and run all cases, the most telling first."""
    products, copies = product_rate(), copy_rate()
    suite.where["bf16 products, TFLOP/s"] = round(products / 1e12, 1)
    suite.where["copying, GB/s"] = round(copies / 1e9)
    peer = partial(others.transformers, product_rate=products)

    def train(cases: Sequence[training.Case]) -> None:
        for case in cases:
            named = {"method": case.name, "batch": f"2 x {case.length}", "levers": case.levers}
            suite.run("gpu_training", named, partial(training.measure, case, products))

    def transformers(recompute: bool) -> None:
        levers = "recompute" if recompute else "none"
        named = {"method": "LoRA, transformers + peft", "batch": "2 x 4096", "levers": levers}
        suite.run("gpu_training", named, partial(peer, 4096, recompute))

    def decode(cases: Sequence[tuple[str, dict[str, Any]]]) -> None:
        for weights, keys in cases:
            named = {"weights": weights, "levers": ", ".join(keys) or "none"}
            suite.run("gpu_decoding", named, partial(others.decode, weights, keys, copies))

    train(training.CASES[:2])
    if DEVICE.type == "cuda":
        suite.run("gpu_rows", {"library": "mytune"}, products_of_rows)
    decode(DECODING[:3])
    transformers(recompute=True)
    train(training.CASES[2:5])
    suite.run("gpu_nf4", {"library": "mytune"}, others.nf4)
    decode(DECODING[3:])
    transformers(recompute=False)
    train(training.CASES[5:9])
    suite.run("gpu_checkpoints", {"direction": "load"}, others.checkpoint)
    train(training.CASES[9:])


def products_of_rows() -> list[Row]:
    """Return what products of one row take."""
    from tests.gpu import rows  # which needs Triton

    return rows.measure()


ABOUT = {
    "gpu_training": (
        "Training Llama 3 8B on a GPU",
        """The fine-tuning recipe itself over random bfloat16 weights and full rows, LoRA of rank 16
on every linear, AdamW; the median of 5 steps after 3. `recompute` is activation checkpointing of
every block, `keep products` recomputes all but matrix products. MFU counts the work that training
needs (forward and backward pass, causal attention, no recomputing) over the rate of large
matrix products measured on the same device. The peak is what torch's allocator held.
""",
    ),
    "gpu_decoding": (
        "Decoding with Llama 3 8B on a GPU",
        """One row, greedy, 256 new ids after a prompt of 64 and a first one; the better of two runs
after one. Every weight but the embedding is read once for each token: that, over the rate of a
large copy, is the share of what memory could give.
""",
    ),
    "gpu_rows": (
        "Products of one row on a GPU",
        """What decoding does: one row of inputs with the weights of a block of Llama 3 8B, 436 MB
in bfloat16, recorded as a CUDA graph; q, k and v are one product, gate and up are another.
""",
    ),
    "gpu_nf4": (
        "NF4 on a GPU",
        """A weight of 14336 x 4096 from NF4 to bfloat16, with double quantization; the mean of 50.
""",
    ),
    "gpu_checkpoints": (
        "Checkpoints of a GPU",
        """A Hugging Face checkpoint of Llama 3 8B's shape with 8 of its 32 blocks, just written,
onto the device and back.
""",
    ),
}


def machine() -> Row:
    """Return where and with what was measured."""
    found: Row = {"date": time.strftime("%Y-%m-%d"), "device": str(DEVICE)}
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found |= {"device": f"{properties.name}, {memory}", "cuda": torch.version.cuda}
    found |= {"python": platform.python_version(), "versions": versions(sys.executable)}
    return found


def aligned(rows: list[Row]) -> list[Row]:
    """Give all rows the same columns, why there is no figure last."""
    heads = {head: None for row in rows for head in row if head != "result"}
    return [{**heads, **row, "result": row["result"]} for row in rows]


def main() -> int:
    """Measure; write the results unless it was on a CPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start no case after these")
    args = parser.parse_args()
    if not HERE:
        print(f"nothing was measured: {NO_CUDA}")
        return 5
    suite = Suite(args.seconds, None if TINY else RESULTS)
    suite.where = machine()
    try:
        measure(suite)
    finally:
        write(suite)
    return 0


def write(suite: Suite) -> None:
    """Print the tables and write them to the page, unless it was on a CPU."""
    for name, rows in ((name, rows) for name, rows in suite.tables.items() if rows):
        title, about = ABOUT[name]
        print(f"\n{title}\n\n{table(aligned(rows))}", flush=True)
        if not TINY:
            about_it = SimpleNamespace(TITLE=title, __doc__=about)
            write_page(name, about_it, aligned(rows), suite.where)


if __name__ == "__main__":
    sys.exit(main())
