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
    expected = F.linear(x, numbers * scale[:, None])
    torch.testing.assert_close(row_product(x, numbers, scale), expected, rtol=1e-4, atol=1e-2)
torch.library.opcheck(row_product, (x, weight.float()))
"""


def test_the_kernels_give_what_linears_give() -> None:
    run_in_interpreter(SCRIPT)
