"""A normal weight of 2048 x 2048 in NF4 and back, on the CPU: mytune's, bitsandbytes' (absent if it
is not installed) and torchao's, with double quantization. The error is the relative RMS of the
float32 round trip.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mytune.quantization import NF4Linear
from tests.benchmarks.common import THREADS, Row, median_ratio

TITLE = "NF4"
SIZE = 2048
Dequantize = Callable[[], Tensor]


def measure(quick: bool) -> list[Row]:
    """Return a row per dtype and library."""
    torch.set_num_threads(THREADS)
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return [
        row
        for dtype in (torch.float32, torch.bfloat16)
        for row in measure_dtype(weight.to(dtype), turns=20 if quick else 100)
    ]


def measure_dtype(weight: Tensor, turns: int) -> list[Row]:
    """Compare all libraries in one dtype, turn by turn."""
    calls = {name: make(weight) for name, make in LIBRARIES.items()}
    calls = {name: call for name, call in calls.items() if call}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "dtype": str(weight.dtype).removeprefix("torch."),
            "library": name,
            "dequantize, ms": 1e3 * statistics.median(seconds[name]),
            "mytune is x times as fast": median_ratio(seconds["mytune"], seconds[name]),
            "relative error": float((call().float() - weight).norm() / weight.float().norm()),
        }
        for name, call in calls.items()
    ]


def mytune(weight: Tensor) -> Dequantize:
    linear = NF4Linear(SIZE, SIZE, device="meta")
    linear.quantize_(weight)
    return linear.dequantize


def bitsandbytes(weight: Tensor) -> Dequantize | None:
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    packed = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return lambda: functional.dequantize_4bit(*packed)


def torchao(weight: Tensor) -> Dequantize:
    from torchao.quantization import to_nf4

    return to_nf4(weight).get_original_weight


LIBRARIES: dict[str, Callable[[Tensor], Dequantize | None]] = {
    "mytune": mytune,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
}
