"""Levers on CUDA: copies beside the computation change no bit, and memory goes down."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mytune.models.llama3 import llama3
from mytune.modules import LinearCrossEntropyLoss
from mytune.training import (
    StepInBackward,
    checkpoint_activations,
    compile_blocks,
    load_optimizer_state,
    offload_activations,
    optimizer_state,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")

SIZES = dict(vocab_size=512, num_layers=8, num_heads=8, num_kv_heads=2, embed_dim=512)
SIZES |= dict(intermediate_dim=1536, max_seq_len=1024)
LOSS = LinearCrossEntropyLoss()


def build():
    torch.manual_seed(0)
    with torch.device("cuda"):
        return llama3(**SIZES).bfloat16()


def batch(seed=0, rows=4, length=1024):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(512, (rows, length), generator=generator).cuda()
    return {"tokens": tokens, "labels": tokens.roll(-1, 1)}


def gradients(model, given, **offloading):
    """Return the loss and every gradient, and the most memory that the pass took."""
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with offload_activations(model, bool(offloading), **offloading):
        loss = LOSS(model, given)
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    return [loss.detach(), *(p.grad for p in model.parameters())], peak


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("streams", [False, True], ids=["waiting", "beside"])
def test_offloading_is_exact_without_a_stop_in_between(deterministic, recompute, streams):
    """Twenty passes that nobody waits for: a copy that comes too late would show."""
    plain, model = build(), build()
    checkpoint_activations(model, recompute)
    given = [batch(seed) for seed in range(20)]
    expected = [[g.clone() for g in gradients(plain, each)[0]] for each in given]
    torch.cuda.synchronize()
    got = [
        [g.clone() for g in gradients(model, each, use_streams=streams, min_bytes=2**16)[0]]
        for each in given
    ]
    for left, right in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_offloading_saves_memory():
    model = build()
    gradients(model, batch())
    _, plain = gradients(model, batch())
    _, less = gradients(model, batch(), use_streams=True)
    assert less < 0.6 * plain


def test_a_copy_that_nobody_asks_for_leaves_memory_in_order():
    """The first block's loss has no gradient: what it saved is started and never fetched."""
    x = torch.randn(2**20, device="cuda", requires_grad=True)
    for _ in range(10):
        with offload_activations(nn.Linear(1, 1).cuda(), True):
            unused = (x * 2).exp()
            loss = (x * 3).sin().sum()
        loss.backward()
        del unused
        torch.testing.assert_close(x.grad, 3 * (3 * x.detach()).cos())
        x.grad = None


@pytest.mark.parametrize("keep_products", [False, True])
def test_recomputing_is_exact_and_compiles(deterministic, keep_products):
    model = build()
    checkpoint_activations(model, keep_products=keep_products)
    expected, _ = gradients(build(), batch())
    got, _ = gradients(model, batch())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    compile_blocks(model)
    compiled, _ = gradients(model, batch())
    torch.testing.assert_close(compiled[0], expected[0], rtol=1e-3, atol=0)


def test_stepping_in_backward_is_exact_and_needs_less(deterministic):
    """With few tokens: gradients are then most of what a step takes."""
    peaks, weights = [], []
    for in_backward in (False, True):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        stepper = StepInBackward(optimizer) if in_backward else None
        for seed in range(3):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            LOSS(model, batch(seed, rows=1, length=64)).backward()
            optimizer.step()
            optimizer.zero_grad()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert stepper is None or stepper.grad_norm() > 0
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    assert peaks[-1] < 0.6 * peaks[2]


def go_on(optimizer, model, steps):
    for seed in range(steps):
        LOSS(model, batch(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "name",
    [
        "bitsandbytes.optim.AdamW8bit",
        "bitsandbytes.optim.PagedAdamW8bit",
        "torchao.optim.AdamW8bit",
        "torchao.optim._AdamW",
        "torchao.optim.CPUOffloadOptimizer",
    ],
)
def test_optimizers_resume_exactly(deterministic, name):
    package, _, attribute = name.rpartition(".")
    make = partial(getattr(pytest.importorskip(package), attribute), lr=1e-3)
    model = build()
    optimizer = make(model.parameters())
    go_on(optimizer, model, 2)
    twin = build()
    twin.load_state_dict(model.state_dict())
    fresh = make(twin.parameters())
    tensors, said = optimizer_state(model, optimizer)
    load_optimizer_state(twin, fresh, {k: v.clone() for k, v in tensors.items()}, said)
    if "Paged" in name:
        paged = [s["state1"] for s in fresh.state.values() if s["state1"].numel() >= 1e5]
        assert paged and all(getattr(each, "is_paged", False) for each in paged)
    go_on(optimizer, model, 2)
    go_on(fresh, twin, 2)
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)
