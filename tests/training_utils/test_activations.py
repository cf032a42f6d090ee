"""Recomputed and offloaded activations: nothing changes but what is kept, and that it does."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mytune.errors import ConfigError
from mytune.models.llama3 import llama3, lora_llama3
from mytune.modules import LinearCrossEntropyLoss
from mytune.training import (
    checkpoint_activations,
    compile_blocks,
    offload_activations,
    recomputed_blocks,
)
from mytune.training.activations import _Copies
from mytune.training.planning.simulate import Ledger

SIZES = dict(vocab_size=64, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=16)
LOSS = LinearCrossEntropyLoss()


def batch():
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "labels": tokens.roll(-1, 1)}


def build(lora=False):
    torch.manual_seed(0)
    return (
        lora_llama3(["q_proj", "v_proj"], True, lora_dropout=0.2, **SIZES)
        if lora
        else llama3(**SIZES)
    )


def gradients(model, **offloading):
    """Return the loss and every gradient of one pass; dropout draws the same each time."""
    torch.manual_seed(2)
    with offload_activations(model, bool(offloading), **offloading):
        loss = LOSS(model, batch())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(left, right):
    assert len(left) == len(right) > 5
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("blocks", [True, [0, 2], []])
@pytest.mark.parametrize("keep_products", [False, True])
def test_recomputing_is_exact(lora, blocks, keep_products):
    model = build(lora)
    checkpoint_activations(model, blocks, keep_products)
    assert_same(gradients(model), gradients(build(lora)))


@pytest.mark.parametrize("keep_products", [False, True])
def test_recomputing_compiled_blocks_changes_no_number(monkeypatch, keep_products):
    torch._dynamo.reset()
    model, plain = build(), build()
    checkpoint_activations(model, keep_products=keep_products)
    for layer in model.layers:
        monkeypatch.setattr(layer, "compile", partial(layer.compile, backend="aot_eager"))
    compile_blocks(model)
    for mine, theirs in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def saved_bytes(forward):
    """Return the bytes, beside the loss, that a forward pass keeps for its backward pass."""
    with Ledger() as ledger:
        loss = forward()
        return ledger.now.total() - loss.untyped_storage().nbytes()


def test_what_a_forward_pass_keeps_is_counted_once_and_without_parameters():
    x, weight = torch.ones(10, 20), torch.ones(30, 20, requires_grad=True)

    def forward():
        y = x @ weight.T  # keeps x, which was given, and a view of the weight
        z = (y.exp() * 2).exp()  # each exp keeps its result; the product, which is dropped, nothing
        return (z.view(-1) * z.view(-1)).sum()  # keeps z, which is kept already

    assert saved_bytes(forward) == 2 * 4 * 10 * 30


def cost(*arguments):
    """Return (bytes kept, FLOP of a forward and backward pass)."""
    model = build()
    checkpoint_activations(model, *arguments)
    kept = saved_bytes(partial(LOSS, model, batch()))
    with FlopCounterMode(display=False) as flop:
        LOSS(model, batch()).backward()
    return kept, flop.get_total_flops()


def test_recomputing_trades_bytes_for_products():
    everything, none = cost(False), cost(True)
    half, products = cost([0, 2]), cost(True, True)
    for kept, flop in (half, products):
        assert none[0] < kept < everything[0]
        assert none[1] > flop > everything[1]
    # A block's input is all that is left of it.
    assert (everything[0] - half[0]) == pytest.approx(half[0] - none[0], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        ((False,), []),
        ((True,), [0, 1, 2, 3, 4]),
        ((False, "full"), [0, 1, 2, 3, 4]),
        ((True, "selective", 2), [0, 2, 4]),
        ((False, "selective", "3"), [0, 3]),
        ((False, "selective", "op"), [0, 1, 2, 3, 4]),
        ((False, "auto"), [0, 1, 2, 3, 4]),
    ],
)
def test_which_blocks_are_recomputed(arguments, blocks):
    assert list(recomputed_blocks(5, *arguments)) == blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((True, "selektive"), r"ac_mode is 'selektive'; did you mean 'selective'\?"),
        ((True, "selective"), "ac_option is None; with ac_mode=selective it is op, or n"),
        ((True, "selective", 0), "ac_option is 0"),
        ((True, "selective", "ops"), "ac_option is 'ops'"),
        ((True, "selective", "²"), "ac_option is '²'"),
        ((True, None, 2), "ac_option is 2, which only ac_mode=selective takes"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        recomputed_blocks(5, *arguments)


@pytest.fixture
def copies(monkeypatch):
    """Make offloading on the CPU a real copy, two ahead as on CUDA; return what was copied."""
    made = {"out": [], "back": []}

    def out(self, tensor):
        made["out"].append(tensor.untyped_storage().data_ptr())
        return tensor.clone()

    def start(self, moved):
        moved.back = moved.host.clone()
        made["back"].append(weakref.ref(moved.back))

    monkeypatch.setattr(_Copies, "ahead", 2)
    monkeypatch.setattr(_Copies, "out", out)
    monkeypatch.setattr(_Copies, "start", start)
    return made


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_offloading_is_exact_and_keeps_weights_in_place(copies, lora, recompute):
    model = build(lora)
    checkpoint_activations(model, recompute)
    assert_same(gradients(model, min_bytes=0), gradients(build(lora)))
    assert copies["out"]
    assert not {p.untyped_storage().data_ptr() for p in model.parameters()} & {*copies["out"]}


def test_what_is_saved_twice_is_copied_once(copies):
    a, b = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    with offload_activations(build(), True, min_bytes=0) as waiting:
        shared = a + b
        loss = (shared * a.exp() + shared * b).sum()  # exp keeps its result
    loss.backward()
    torch.testing.assert_close(b.grad, (a + 2 * b + a.exp()).detach())
    assert waiting.nbytes == 3 * 4 * 4  # shared, a.exp(), b
    assert len(copies["out"]) == len(copies["back"]) == 3


def test_memory_that_is_used_again_is_another_tensor(copies):
    a = torch.randn(1000, requires_grad=True)
    with offload_activations(build(), True, min_bytes=0):
        loss = sum((a * n).square().sum() for n in range(5))  # each product's memory is the last's
    loss.backward()
    torch.testing.assert_close(a.grad, 2 * a.detach() * sum(n * n for n in range(5)))


def test_small_tensors_stay(copies):
    gradients(build(), min_bytes=100_000)
    assert not copies["out"]


def test_nothing_is_left_after_the_backward_pass(copies):
    model = build()
    gc.disable()
    try:
        gradients(model, min_bytes=0)
        assert copies["back"] and not [ref for ref in copies["back"] if ref() is not None]
    finally:
        gc.enable()
