"""The work that training a token is, and the rates of the device that it is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

from mytune.modules.decoder import DecoderConfig
from tests.gpu import DEVICE, TINY


def flop_per_token(config: DecoderConfig, length: int, method: int | Literal["full"]) -> float:
    """Return the FLOP of forward and backward pass that a token needs; recomputing is no need.

    Frozen weights have no gradient, so a LoRA run makes two products where a full one makes three.

    Args:
        method: rank of LoRA on every linear of the blocks, or "full".
    """
    e, d, f = config.head_dim, config.embed_dim, config.intermediate_dim
    q, kv = config.num_heads * e, config.num_kv_heads * e
    linears = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    products = config.num_layers * sum(i * o for i, o in linears) + config.vocab_size * d
    # Two products of length / 2 keys on average; their backward pass is 2.5 times as much.
    attention = 3.5 * 2 * length * q * config.num_layers
    if method == "full":
        return 6 * products + attention
    adapters = config.num_layers * sum(method * (i + o) for i, o in linears)
    return 4 * products + attention + 6 * adapters


def product_rate() -> float:
    """Return the FLOP per second of large bfloat16 products, as measured now."""
    size = 256 if TINY else 8192
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: a @ b, 20)


def copy_rate() -> float:
    """Return the bytes per second that a large copy reads and writes, as measured now."""
    count = 2**20 if TINY else 2**30
    a = torch.zeros(count, device=DEVICE, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return 2 * 2 * count / seconds(lambda: b.copy_(a), 20)


def seconds(work: Callable[[], object], times: int) -> float:
    """Return the seconds that `work` takes, on average after a warm-up."""
    for _ in range(3):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def wait() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
