"""Products of linears on the CPU: as torch and torchao have them, and as `pack_linears` lays them
out for decoding. Weights are normal and were rounded to bfloat16; so many of each shape are gone
through that no cache holds them. Figures are billions of weights per second, and how many times as
fast the packed ones are, turn by turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from mytune.generation.packing import packed_linear
from tests.benchmarks.common import THREADS, Row, median_ratio

TITLE = "Linears"
SHAPES = ((1024, 512), (512, 1536), (4096, 4096), (128_256, 256))
ROWS = (1, 8, 64, 512)
WEIGHTS = 2**25  # of a shape, in all
KINDS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.bfloat16,
    "int8, inputs too": torch.bfloat16,
}
CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int8, inputs too": Int8DynamicActivationInt8WeightConfig(),
}


def measure(quick: bool) -> list[Row]:
    """Return a row per kind of weight, shape and rows."""
    torch.set_num_threads(THREADS)
    cases = product(KINDS, SHAPES[2:3] if quick else SHAPES)
    with torch.inference_mode():
        return [row for kind, shape in cases for row in measure_shape(kind, *shape, quick)]


def measure_shape(kind: str, out: int, width: int, quick: bool) -> Iterator[Row]:
    """Compare the linears of a shape, at every number of rows."""
    count = -(-WEIGHTS // (out * width))
    plain = nn.Sequential(
        *(nn.Linear(width, out, bias=False, dtype=torch.bfloat16) for _ in range(count))
    )
    if kind in CONFIGS:
        quantize_(plain, CONFIGS[kind])
    else:
        plain.to(KINDS[kind])
    packed = [packed_linear(linear.weight, 1, 1) or linear for linear in plain]
    for rows in ROWS[:2] if quick else ROWS:
        x = torch.randn(rows, width, dtype=KINDS[kind])
        seconds: dict[str, list[float]] = {"plain": [], "packed": []}
        for _ in range(3 if rows > 8 else 9):
            for name, linears in (("plain", plain), ("packed", packed)):
                seconds[name].append(taken(linears, x))
        rates = {name: count * out * width / statistics.median(s) for name, s in seconds.items()}
        yield {
            "weights": kind,
            "out x in": f"{out} x {width}",
            "rows": rows,
            "plain, 10^9/s": rates["plain"] / 1e9,
            "packed, 10^9/s": rates["packed"] / 1e9,
            "packed is x times as fast": median_ratio(seconds["packed"], seconds["plain"]),
        }


def taken(linears: nn.Sequential | list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Return the CPU seconds of one product with each linear."""
    start = time.process_time() if THREADS == 1 else time.perf_counter()
    for linear in linears:
        linear(x)
    return (time.process_time() if THREADS == 1 else time.perf_counter()) - start
