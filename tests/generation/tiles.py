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
