"""NF4's Triton kernel in Triton's interpreter, on the CPU; `tests/gpu` runs it on a GPU."""

from __future__ import annotations

from tests.triton import run_in_interpreter

# The interpreter cuts off what bfloat16 cannot hold, where a GPU rounds: float16 tells as much.
SCRIPT = """
import torch
from mytune.quantization.nf4 import dequantize_nf4, quantize_nf4
from mytune.quantization.nf4_triton import dequantize_kernel
for shape in ((1, 1), (3, 5), (7, 64), (33, 129), (130, 256)):
    packed = quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    for dtype in (torch.float32, torch.float16):
        found = dequantize_kernel(*packed, *shape, dtype)
        assert torch.equal(found, dequantize_nf4(*packed, shape, dtype)), (shape, dtype)
    found, expected = dequantize_kernel(*packed, *shape, torch.bfloat16), found.bfloat16()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
torch.library.opcheck(dequantize_kernel, (*packed, 130, 256, torch.float32))
"""


def test_the_kernel_gives_what_the_table_gives() -> None:
    run_in_interpreter(SCRIPT)
