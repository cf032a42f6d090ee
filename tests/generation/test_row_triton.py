"""The kernels of one row in Triton's interpreter, on the CPU; `tests/gpu` runs them on a GPU."""

from __future__ import annotations

from tests.triton import run_in_interpreter

SCRIPT = """
import torch
from torch.nn import functional as F
from mytune.generation.row_triton import fits, row_product
for out, width in ((4, 2048), (8, 3072)):
    x = torch.randn(1, 1, width)
    for dtype in (torch.float32, torch.float16):
        weight = torch.randn(out, width).to(dtype)
        assert fits(weight) and not fits(weight[:, :100]) and not fits(weight[:, ::2])
        expected = F.linear(x.to(dtype).float(), weight.float()).to(dtype)
        torch.testing.assert_close(row_product(x.to(dtype), weight), expected, rtol=1e-3, atol=1e-3)
    numbers, scale = torch.randint(-128, 128, (out, width), dtype=torch.int8), torch.rand(out)
    assert fits(numbers) and not fits(numbers[:2]) and not fits(numbers.flatten()[1:-3].view(-1, 4))
    expected = F.linear(x, numbers * scale[:, None])
    torch.testing.assert_close(row_product(x, numbers, scale), expected, rtol=1e-4, atol=1e-2)
    x = torch.randn(1, 1, width + 1).bfloat16()[..., 1:]
    expected = F.linear(x.float(), numbers * scale[:, None])
    found = row_product(x, numbers, scale)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 6e-3 * expected.norm()  # the interpreter truncates
x = torch.randn(1, 1, width)
torch.library.opcheck(row_product, (x, weight.float()))
"""

TILES = """
import torch
from mytune.generation import tile_triton
from tests.generation.tiles import tiles_of, weight_of
for group, out, width in ((32, 32, 1024), (64, 16, 1024), (128, 8, 1024), (256, 64, 2048)):
    tile_triton._PROGRAMS = 1
    numbers = torch.randint(0, 16, (out, width))
    scales = torch.randn(width // group, out, 2).bfloat16()
    weight = weight_of(tiles_of(numbers), scales)
    scale, zero = scales[width // 2 // group].double().unbind(-1)
    assert torch.equal(weight[:, width // 2], (numbers[:, width // 2] - 8) * scale + zero)
    x = torch.randn(1, 1, width).bfloat16()
    expected = x.double() @ weight.T
    found = tile_triton.tile_product(x, tiles_of(numbers), scales)
    assert found.shape == expected.shape and found.dtype == torch.bfloat16
    assert (found - expected).norm() < 6e-3 * expected.norm()  # the interpreter truncates
torch.library.opcheck(tile_triton.tile_product, (x, tiles_of(numbers), scales))
"""


def test_the_kernels_give_what_linears_give() -> None:
    run_in_interpreter(SCRIPT)


def test_the_kernel_of_tiles_gives_what_their_numbers_give() -> None:
    run_in_interpreter(TILES)
