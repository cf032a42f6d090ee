"""Keeping sources in the place of inputs changes nothing: all is compared with plain autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mytune.modules import derived
from mytune.modules.decoder import Block, DecoderConfig, rope_angles
from mytune.modules.derived import Derived
from mytune.modules.lora import LoRAConfig, adapter_state, apply_lora, base_weight
from mytune.quantization import apply_nf4
from mytune.training import checkpoint_activations, offload_activations

SIZES = DecoderConfig(
    vocab_size=8,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=64,
    intermediate_dim=96,
    head_dim=16,
    max_seq_len=64,
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def plain_product(x, weight):
    return F.linear(x.value, weight.to(x.value.dtype))


def plain_derive(make, *sources):
    return Derived(make(*sources))


def plain_lora(linear, x):
    x = x.value if isinstance(x, Derived) else x
    y = type(linear).__mro__[2].forward(linear, x)  # the base class's
    x = F.dropout(x, linear.lora.dropout, linear.training)
    low = F.linear(x, linear.lora_A.weight.to(x.dtype))
    y = y + F.linear(low * linear.lora.scaling, linear.lora_B.weight.to(x.dtype))
    if linear.lora_magnitude_vector is None:
        return y
    norm = (base_weight(linear).float() + linear.delta()).detach().norm(dim=1)
    return (y * (linear.lora_magnitude_vector / norm)).to(y.dtype)


@pytest.fixture
def plainly(monkeypatch):
    """Return a function that calls another with the model's parts as plain autograd has them."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(derived, "derive", plain_derive)
            patch.setattr(derived, "product", plain_product)
            patch.setattr("mytune.modules.lora._LoRA.forward", plain_lora)
            return function(*args)

    return call


def build(modules=(), dtype=torch.float32, nf4=False, train_base=False, **lora):
    torch.manual_seed(0)
    block = Block(SIZES, 0).to(dtype)
    if nf4:
        apply_nf4(block)
    if modules:
        apply_lora(block, LoRAConfig(modules, rank=4, **lora))
        for adapter in adapter_state(block).values():
            nn.init.normal_(adapter, std=0.05)
    if train_base:
        block.requires_grad_(True)
    return block


def results(block, needs_x=True, run=lambda block, *args: block(*args)):
    """Return output and all gradients, by name; those of the same loss each time."""
    torch.manual_seed(1)
    dtype = block.attn_norm.weight.dtype
    x = torch.randn(2, 10, SIZES.embed_dim).to(dtype).requires_grad_(needs_x)
    rope = rope_angles(SIZES, torch.arange(10)[None])
    block.zero_grad()
    y = run(block, x, rope)
    (y * torch.randn(y.shape).to(dtype)).sum().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


CASES = {
    "full": {},
    "lora": dict(modules=ALL),
    "lora on attention": dict(modules=ATTENTION),
    "lora on q and v": dict(modules=("q_proj", "v_proj")),
    "lora on gate": dict(modules=("gate_proj",)),
    "lora on down": dict(modules=("down_proj",)),
    "lora and base": dict(modules=ALL, train_base=True),
    "lora with dropout": dict(modules=ALL, dropout=0.25),
    "rslora": dict(modules=ALL, use_rslora=True, alpha=3.0),
    "dora": dict(modules=ALL, use_dora=True),
    "qlora": dict(modules=ALL, nf4=True),
    "qdora on down": dict(modules=("down_proj",), nf4=True, use_dora=True),
}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.0}


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "dropout" not in case])
def test_output_and_gradients_are_those_of_plain_autograd(case, dtype, needs_x, plainly):
    block = build(dtype=dtype, **CASES[case])
    expected = plainly(results, block, needs_x)
    found = results(block, needs_x)
    assert found.keys() == expected.keys()
    assert ("x" in found) and len(found) > 2
    for name, tensor in found.items():
        if tensor is not None:  # the terms of a norm's gradient are added up in another order
            bound = TOLERANCE[dtype] * expected[name].abs().max().item()
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=bound)


def kept_bytes(block, tokens):
    """Return the bytes that the forward pass keeps beside parameters and RoPE's angles."""
    rope = rope_angles(SIZES, torch.arange(tokens)[None])
    given = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *rope)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, tokens, SIZES.embed_dim, dtype=block.attn_norm.weight.dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x.requires_grad_(), rope)
    del y
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in given)


def kept_per_token(block):
    return (kept_bytes(block, 48) - kept_bytes(block, 16)) / 32


# What a block must keep per token: two hidden states, queries and attention's output, keys and
# values, gate and up; and attention's sum of exponentials, in float32, per head.
NUMBERS, SUMS = 4 * 64 + 2 * 32 + 2 * 96, 4


@pytest.mark.parametrize("case", ["full", "lora", "qlora"])
def test_a_block_keeps_each_source_once(case):
    block = build(dtype=torch.bfloat16, **CASES[case])
    low_rank = 0 if case == "full" else 2 * 4 * len(ALL)
    assert kept_per_token(block) == 2 * NUMBERS + low_rank + 4 * SUMS


def test_dropout_keeps_a_mask_of_a_byte():
    block = build(dtype=torch.bfloat16, modules=ALL, dropout=0.25)
    plain = build(dtype=torch.bfloat16, modules=ALL)
    assert kept_per_token(block) - kept_per_token(plain) == 6 * 64 + 96


def test_dropout_is_that_of_torch(plainly):
    """Both draw the same mask where both have the native kernel; float64 tells them apart."""
    block = build(dtype=torch.float64, modules=("down_proj",), dropout=0.25)

    def native(x, rate, training):
        return torch.native_dropout(x, rate, training)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", native)
        expected = plainly(results, block)
    found = results(block)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-11)
    assert not torch.equal(found["y"], results(block.eval())["y"])


def recomputed(block, x, rope):
    return checkpoint(block, x, rope, use_reentrant=False)


def offloaded(block, x, rope):
    with offload_activations(block, True, min_bytes=0):
        return block(x, rope)


def twice(block, x, rope):
    return block(block(x, rope), rope)


@pytest.mark.parametrize("run", [recomputed, offloaded], ids=lambda run: run.__name__)
@pytest.mark.parametrize("case", ["full", "lora", "lora with dropout", "dora", "qlora"])
def test_recomputing_and_offloading_are_exact(case, run):
    block = build(**CASES[case])
    expected, found = results(block), results(block, run=run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_block_can_be_used_twice_and_its_graph_too(case, plainly):
    block = build(dtype=torch.float64, **CASES[case])
    expected = plainly(lambda: results(block, run=twice))
    found = results(block, run=twice)
    for name, tensor in found.items():
        bound = 1e-13 * expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=bound)
    x = torch.randn(1, 4, 64, dtype=torch.float64, requires_grad=True)
    loss = block(x, rope_angles(SIZES, torch.arange(4)[None])).sum()
    leaves = [p for p in block.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", ["full", "lora"])
def test_compiled_blocks_agree_and_keep_as_little(case):
    torch._dynamo.reset()
    block = build(**CASES[case])
    expected = results(block)
    block.compile(fullgraph=True)
    found = results(block)
    for name, tensor in found.items():
        bound = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=bound)
    low_rank = 0 if case == "full" else 4 * len(ALL)
    assert kept_bytes(block, 10) <= 10 * 4 * (NUMBERS + low_rank + 2 * SUMS)  # float32, strided


@pytest.mark.parametrize("case", ["full", "lora", "lora with dropout", "qlora"])
def test_compiled_and_recomputed_a_block_keeps_its_input_alone(case):
    torch._dynamo.reset()
    block = build(**CASES[case])
    expected = results(block)
    checkpoint_activations(SimpleNamespace(layers=[block]))
    block.compile(fullgraph=True, backend="aot_eager")
    found = results(block)
    for name, tensor in found.items():
        bound = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=bound)
    assert kept_per_token(block) == 4 * SIZES.embed_dim


@pytest.mark.parametrize("products", [False, True])
def test_compiled_a_4_bit_block_keeps_no_more_than_any_other(products):
    kept = []
    for case in ("lora", "qlora"):
        torch._dynamo.reset()
        block = build(**CASES[case])
        checkpoint_activations(SimpleNamespace(layers=[block]), products, keep_products=True)
        block.compile(fullgraph=True, backend="aot_eager")
        kept.append(kept_per_token(block))
    assert kept[1] == kept[0]


def test_a_head_with_adapters_takes_plain_tensors():
    head = nn.Sequential()
    head.add_module("lm_head", nn.Linear(64, 8, bias=False))
    apply_lora(head, LoRAConfig(("lm_head",), rank=4))
    for adapter in adapter_state(head).values():
        nn.init.normal_(adapter)
    x = torch.randn(3, 64, requires_grad=True)
    weight = head.lm_head.weight + head.lm_head.delta()
    torch.testing.assert_close(head.lm_head(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)


def test_biases_and_other_linears_are_called_as_they_are(plainly):
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    block = build(dtype=torch.float64)
    block.attn.q_proj = nn.Linear(64, 64, dtype=torch.float64)
    block.mlp.down_proj = Other(96, 64, bias=False, dtype=torch.float64)
    expected, found = plainly(results, block), results(block)
    assert "attn.q_proj.bias" in found
    for name, tensor in found.items():
        bound = 1e-14 * expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=bound)


def test_what_needs_no_gradient_is_kept_by_nobody():
    made = derived.derive(torch.sin, torch.ones(3))
    assert not made.sources and made.make(made.value) is made.value
    assert derived.derive(torch.sin, torch.ones(3, requires_grad=True)).sources


def test_inference_keeps_nothing_and_gives_the_same():
    block = build(modules=ALL)
    expected = results(block)["y"]
    torch.manual_seed(1)
    x, rope = torch.randn(2, 10, SIZES.embed_dim), rope_angles(SIZES, torch.arange(10)[None])
    with torch.inference_mode():
        assert torch.equal(block(x, rope), expected)


def test_an_input_is_made_again_once_for_all_that_need_it():
    made = []

    def make(x):
        made.append(x)
        return x.sin()

    x = torch.randn(3, 4, requires_grad=True)
    weights = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]
    value = derived.derive(make, x)
    sum(derived.product(value, weight).sum() for weight in weights).backward()
    assert len(made) == 2  # for the projections, and then for their weights and `x`
    assert all(weight.grad is not None for weight in weights) and x.grad is not None
