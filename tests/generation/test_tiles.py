"""4-bit weights in CUDA's tiles: which linear takes them, and that rows of them can be joined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mytune.generation.row_linear import TileLinear, tile_layout

tiled = pytest.importorskip(
    "torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor"
)
IN, GROUP = 2048, 128


def weight(rows: int, shape: tuple[int, int] | None = None) -> Tensor:
    tiles = torch.randint(0, 100, (-(-rows // 8), IN // 128, 32, 4), dtype=torch.int32)
    scales = torch.randn(IN // GROUP, 8 * len(tiles), 2, dtype=torch.bfloat16)
    kind = tiled.Int4TilePackedTo4dTensor
    return kind(tiles, scales, [1, GROUP], torch.Size(shape or (rows, IN)))


def product(x: Tensor, tiles: Tensor, group: int, scales: Tensor) -> Tensor:
    """In the place of CUDA's: an output depends on x, and on its row's tiles and scales."""
    assert x.shape[1:] == (IN,) and x.is_contiguous() and group == GROUP
    assert scales.is_contiguous() and scales.shape == (IN // GROUP, 8 * len(tiles), 2)
    numbers = tiles.double().sum((1, 2, 3)).repeat_interleave(8)
    return x.double().sum(1)[:, None] * numbers + scales.double().sum((0, 2))


def test_joined_they_give_what_each_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_weight_int4pack_mm", product)
    layouts = [tile_layout(weight(rows)) for rows in (64, 16, 16)]
    assert all(layout and layout[0] is TileLinear for layout in layouts)
    parts = [tensors for _, tensors in layouts]  # type: ignore[misc]
    joined = TileLinear(*(torch.cat(each) for each in zip(*parts, strict=True)))
    x = torch.randn(2, 3, IN, dtype=torch.bfloat16)
    expected = torch.cat([TileLinear(*part)(x) for part in parts], dim=-1)
    found = joined(x)
    assert found.shape == (2, 3, 96)
    assert torch.equal(found, expected)
    assert torch.equal(joined(x[:, -1]), expected[:, -1])  # the kernel takes no strided rows


@pytest.mark.parametrize("shape", [(60, IN), (64, IN - 64)], ids=str)
def test_padded_ones_stay_torchaos(shape: tuple[int, int]) -> None:
    assert tile_layout(weight(64, shape)) is None
    assert tile_layout(torch.nn.Parameter(torch.ones(8, 8))) is None
