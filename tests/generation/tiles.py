"""4-bit numbers in the tiles that torch's kernel for CUDA reads."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = (0, 8, 16, 24, 1, 9, 17, 25)  # of a word's numbers, from its lowest bits on


def tiles_of(numbers: Tensor) -> Tensor:
    """Return numbers from 0 to 15 [out, in] as tiles, int32 [out / 8, in / 128, 32, 4]."""
    out, width = numbers.shape
    blocks = numbers.long().view(out // 8, 8, width // 128, 4, 32)
    tiles = torch.zeros(out // 8, width // 128, 32, 4, dtype=torch.long)
    for lane in range(32):
        for place, column in enumerate(COLUMNS):
            row, first = lane // 4, 2 * (lane % 4)
            tiles[:, :, lane] |= blocks[:, row, :, :, first + column] << 4 * place
    return tiles.int()


def weight_of(tiles: Tensor, scales: Tensor) -> Tensor:
    """Return the weight [out, in] that tiles hold, in float64.

    Args:
        scales: scale and zero of each group of a row, [in / group, out, 2].
    """
    heights, blocks = tiles.shape[:2]
    numbers = torch.zeros(heights, 8, blocks, 4, 32, dtype=torch.double, device=tiles.device)
    for lane in range(32):
        for place, column in enumerate(COLUMNS):
            row, first = lane // 4, 2 * (lane % 4)
            numbers[:, row, :, :, first + column] = (tiles[:, :, lane] >> 4 * place & 15).double()
    numbers = numbers.view(8 * heights, 128 * blocks)
    group = numbers.shape[1] // len(scales)
    scale, zero = scales.double().repeat_interleave(group, 0).unbind(-1)
    return (numbers - 8) * scale.T + zero.T
