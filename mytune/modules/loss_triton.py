"""Cross entropy and its gradient on a GPU in one Triton kernel, in the place of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096  # logits that a program reads at a time


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits,
    labels,
    losses,
    WIDTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * WIDTH
    label = tl.load(labels + row)
    picked = tl.load(logits + label).to(tl.float32)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + column, mask=column < WIDTH, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    tl.store(losses + row, largest + tl.log(total) - picked)
    if GRADIENT:
        for start in range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            here = column < WIDTH
            x = tl.load(logits + column, mask=here, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - largest) / total - tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=here)


def cross_entropy_kernel(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """Return the summed cross entropy (float32, 0-d) of logits [n, v] and labels [n].

    Args:
        gradient: overwrite the logits with their gradient.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _cross_entropy[(len(logits),)](
            logits, labels.contiguous(), losses, logits.shape[1], gradient, _COLUMNS, num_warps=8
        )
    return losses.sum()
