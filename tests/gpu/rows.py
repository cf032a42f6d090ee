"""Products of one row with the weights of a block of Llama 3 8B: `python -m tests.gpu.rows`.

As a program it also tries other sizes of the kernels' programs: `row_triton` and `tile_triton` in
`mytune.generation` have the fastest. Weights of five blocks take turns, so that none is read from a
cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mytune.generation import row_triton, tile_triton
from tests.gpu import DEVICE, HERE, NO_CUDA
from tests.gpu.flops import wait

SHAPES = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)]  # q, k, v; o; gate, up; down
BLOCKS = 5
SIZES = [(2, 2048, 4), (2, 1024, 4), (4, 1024, 4), (4, 1024, 8), (8, 512, 4), (4, 512, 2)]
INT8_SIZES = [(2048, 4), (2048, 2), (1024, 2), (4096, 4), (4096, 8)]
TILE_SIZES = [(n, warps) for n in (1, 128, 256, 512, 10**6) for warps in (4, 8)]  # programs, warps
GROUP = 128


def measure() -> list[dict[str, Any]]:
    """Return the microseconds that a block's products take: torch's, and this library's."""
    return measure_rows() + measure_tiles()


def measure_rows() -> list[dict[str, Any]]:
    """Return what the products with weights of 16 and 8 bits take."""
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
    return rows_of(calls)


def measure_tiles() -> list[dict[str, Any]]:
    """Return what the products with weights of 4 bits take, in tiles."""
    x = {width: torch.randn(1, width, device=DEVICE).bfloat16() for _, width in SHAPES}
    weights = [
        (
            x[width],
            torch.randint(-(2**31), 2**31, (out // 8, width // 128, 32, 4), device=DEVICE).int(),
            torch.randn(width // GROUP, out, 2, device=DEVICE).bfloat16(),
        )
        for _ in range(BLOCKS)
        for out, width in SHAPES
    ]
    return rows_of(
        {
            ("torch", "int4"): [
                lambda x=x, w=w, s=s: torch._weight_int4pack_mm(x, w, GROUP, s)
                for x, w, s in weights
            ],
            ("mytune", "int4"): [
                lambda x=x, w=w, s=s: tile_triton.tile_product(x, w, s) for x, w, s in weights
            ],
        }
    )


def rows_of(calls: dict[tuple[str, str], list[Callable[[], object]]]) -> list[dict[str, Any]]:
    """Return a row for each library and kind of weights."""
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


def show(*what: object) -> None:
    """Print sizes and what they take, at once."""
    print(*what, flush=True)


def main() -> int:
    """Print what each size of the kernels' programs takes."""
    if not HERE or DEVICE.type != "cuda":
        print(f"nothing was measured: {NO_CUDA}")
        return 5
    for row_triton._ROWS, row_triton._COLUMNS, row_triton._WARPS in SIZES:
        show("rows", row_triton._ROWS, row_triton._COLUMNS, row_triton._WARPS, measure_rows())
    for row_triton._INT8_COLUMNS, row_triton._INT8_WARPS in INT8_SIZES:
        show("int8", row_triton._INT8_COLUMNS, row_triton._INT8_WARPS, measure_rows())
    for tile_triton._PROGRAMS, tile_triton._WARPS in TILE_SIZES:
        show("tiles", tile_triton._PROGRAMS, tile_triton._WARPS, measure_tiles())
    return 0


if __name__ == "__main__":
    sys.exit(main())
