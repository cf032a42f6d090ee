"""The attention kernel in Triton's interpreter, on the CPU; `tests/gpu` runs it on a GPU."""

from __future__ import annotations

from tests.triton import run_in_interpreter

SCRIPT = """
import torch
from torch.nn import functional as F
from mytune.modules.attention_triton import attend_one
SHAPES = ((1, 1, 1, 5, 16), (2, 2, 4, 200, 32), (1, 1, 16, 2600, 64))
for batch, heads, group, length, dim in SHAPES:
    q = torch.randn(batch, heads, group, dim)
    k, v = torch.randn(2, batch, heads, length, dim)
    mask = torch.zeros(batch, 1, 1, length)
    mask[..., length - length // 3 :] = -torch.inf  # as positions that are not filled
    mask[-1, ..., : length // 4] = -torch.inf  # as padding
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = attend_one(q, k, v, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
torch.library.opcheck(attend_one, (q, k, v, mask))
"""


def test_the_kernel_is_attention() -> None:
    run_in_interpreter(SCRIPT)
