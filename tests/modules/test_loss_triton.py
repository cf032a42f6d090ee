"""The loss's Triton kernel in Triton's interpreter, on the CPU; `tests/gpu` runs it on a GPU."""

from __future__ import annotations

from tests.triton import run_in_interpreter

SCRIPT = """
import torch
from torch.nn import functional as F
from mytune.modules.loss_triton import cross_entropy_kernel
for rows, columns in ((1, 1), (3, 7), (2, 4096), (5, 9001)):
    logits = torch.randn(rows, columns) * 4
    labels = torch.randint(columns, (rows,))
    expected = F.cross_entropy(logits.requires_grad_(), labels, reduction="sum")
    expected.backward()
    found, kept = logits.detach().clone(), logits.detach().clone()
    for tensor, gradient in ((found, True), (kept, False)):
        loss = cross_entropy_kernel(tensor, labels, gradient)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, logits.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(kept, logits)
"""


def test_the_kernel_gives_loss_and_gradient() -> None:
    run_in_interpreter(SCRIPT)
