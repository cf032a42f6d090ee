"""The kernels of one row in Triton's interpreter, on the CPU; `tests/gpu` runs them on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torch.nn import functional as F
from mytune.generation.row_triton import (
    fits, pack_nibbles, row_product, row_product_of_nibbles, unpack_nibbles
)
for out, width in ((4, 1024), (12, 3072)):
    x = torch.randn(1, 1, width)
    for dtype in (torch.float32, torch.float16):
        weight = torch.randn(out, width).to(dtype)
        assert fits(weight) and not fits(weight[:3]) and not fits(weight[:, ::2])
        expected = F.linear(x.to(dtype).float(), weight.float()).to(dtype)
        torch.testing.assert_close(row_product(x.to(dtype), weight), expected, rtol=1e-3, atol=1e-3)
    numbers, scale = torch.randint(-128, 128, (out, width), dtype=torch.int8), torch.rand(out)
    expected = F.linear(x, numbers * scale[:, None])
    torch.testing.assert_close(row_product(x, numbers, scale), expected, rtol=1e-4, atol=1e-2)
for group in (32, 128):
    out, width = 16, 1024
    numbers = torch.randint(0, 16, (out, width), dtype=torch.uint8)
    scales, zeros = torch.rand(2, out, width // group)
    weight = (numbers.float() - 8).unflatten(1, (-1, group)) * scales[..., None] + zeros[..., None]
    codes, x = pack_nibbles(numbers), torch.randn(1, 1, width)
    assert torch.equal(unpack_nibbles(codes, scales, zeros), weight.flatten(1))
    found = row_product_of_nibbles(x, codes, scales, zeros)
    torch.testing.assert_close(found, F.linear(x, weight.flatten(1)), rtol=1e-4, atol=1e-2)
torch.library.opcheck(row_product, (x, torch.randn(4, 1024)))
torch.library.opcheck(row_product_of_nibbles, (x, codes, scales, zeros))
"""


def test_the_kernels_give_what_linears_give() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
