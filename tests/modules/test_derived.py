"""Keeping sources in the place of inputs changes nothing: all is compared with plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mytune.modules import derived
from mytune.modules.decoder import Block, DecoderConfig, rope_angles
from mytune.modules.derived import Derived
from mytune.modules.lora import LoRAConfig, adapter_state, apply_lora, base_weight
from mytune.quantization import apply_nf4

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
    high = F.linear(low, linear.lora_B.weight.to(x.dtype))
    y = torch.add(y, high, alpha=linear.lora.scaling)
    if linear.lora_magnitude_vector is None:
        return y
    norm = (base_weight(linear).float() + linear.delta()).detach().norm(dim=1)
    return y * (linear.lora_magnitude_vector / norm).to(y.dtype)


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
    """Return output and all gradients, by name."""
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
    "rslora": dict(modules=ALL, use_rslora=True, alpha=3.0),
    "dora": dict(modules=ALL, use_dora=True),
    "qlora": dict(modules=ALL, nf4=True),
    "qdora on down": dict(modules=("down_proj",), nf4=True, use_dora=True),
}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.0}


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
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
