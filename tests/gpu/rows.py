"""Products of one row with the weights of a block of Llama 3 8B: `python -m tests.gpu.rows`.

As a program it also tries other sizes of the kernel's programs: `mytune.generation.row_triton` has
the fastest. Weights of five blocks take turns, so that none is read from a cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mytune.generation import row_triton
from tests.gpu import DEVICE, HERE, NO_CUDA
from tests.gpu.flops import wait

SHAPES = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)]  # q, k, v; o; gate, up; down
BLOCKS = 5
SIZES = [(2, 2048, 4), (2, 1024, 4), (4, 1024, 4), (4, 1024, 8), (8, 512, 4), (4, 512, 2)]
SIZES += [(4, 2048, 4), (4, 2048, 8), (8, 2048, 8), (2, 4096, 4)]  # as many bytes of 8-bit weights


def measure() -> list[dict[str, Any]]:
    """Return the microseconds that a block's products take: cuBLAS's, and this library's."""
    x = {width: torch.randn(1, 1, width, device=DEVICE).bfloat16() for _, width in SHAPES}
    weights = [
        torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(BLOCKS)
        for shape in SHAPES
    ]
    calls: dict[tuple[str, str], list[Callable[[], object]]] = {
        ("cuBLAS", "bf16"): [lambda w=w: F.linear(x[w.shape[1]], w) for w in weights],
        ("mytune", "bf16"): [lambda w=w: row_triton.row_product(x[w.shape[1]], w) for w in weights],
        ("mytune", "int8"): [
            lambda w=w, s=s: row_triton.row_product(x[w.shape[1]], w, s)
            for w, s in ((w.mul(40).to(torch.int8), torch.rand_like(w[:, 0])) for w in weights)
        ],
    }
    return [
        {"library": library, "weights": kind, "microseconds a block": 1e6 * seconds(products)}
        for (library, kind), products in calls.items()
    ]


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return the seconds that a block's calls take on the device, recorded: the best of five."""
    for call in calls[: len(SHAPES)]:
        call()
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    spent = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        wait()
        spent.append(start.elapsed_time(end) / 1e3 / BLOCKS)
    return min(spent[1:])


def main() -> int:
    """Print what each size of the kernel's programs takes."""
    if not HERE or DEVICE.type != "cuda":
        print(f"nothing was measured: {NO_CUDA}")
        return 5
    for size in SIZES:
        row_triton._ROWS, row_triton._COLUMNS, row_triton._WARPS = size
        for row in measure():
            print(size, row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
