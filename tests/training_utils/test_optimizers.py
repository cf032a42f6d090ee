"""Optimizers: tried before loading, stepped in backward, and rounding that loses nothing small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mytune.errors import ConfigError
from mytune.training import StepInBackward, check_optimizer, clip_grad_norm, seed_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Muon", "Adafactor"])
def test_an_optimizer_that_works_is_not_refused(name):
    check_optimizer({"_component_": f"torch.optim.{name}", "lr": 1e-3}, CPU)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"_component_": "torch.optim.LBFGS"}, "asks for a closure"),
        (
            {"_component_": "torch.optim.SparseAdam"},
            "SparseAdam does not work so on cpu: RuntimeError",
        ),
        ({"_component_": "torch.optim.AdamW", "lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_one_that_does_not_work_here_is_refused(component, message):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(component, CPU)


def test_an_optimizer_that_offloads_needs_a_device_to_offload():
    pytest.importorskip("torchao")
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    name = "torchao.optim.CPUOffloadOptimizer"
    with pytest.raises(ConfigError, match="only supports CUDA"):
        check_optimizer({"_component_": name}, CPU)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam", "Adafactor", "RMSprop"])
def test_stepping_in_backward_is_exact_and_frees_gradients(name):
    ours, theirs = net(), net()
    groups = [
        [{"params": m[0].parameters(), "lr": 0.1}, {"params": m[2:].parameters()}]
        for m in (ours, theirs)
    ]
    mine, its = (getattr(torch.optim, name)(group, lr=0.01) for group in groups)
    in_backward = StepInBackward(mine)
    for number in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(number))
        ours(x).square().sum().backward()
        assert all(p.grad is None for p in ours.parameters())
        theirs(x).square().sum().backward()
        assert torch.equal(in_backward.grad_norm(), clip_grad_norm(theirs.parameters(), None))
        for optimizer in (mine, its):
            optimizer.step()
            optimizer.zero_grad()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right)
        for key, value in its.state[right].items():
            assert torch.equal(torch.as_tensor(mine.state[left][key]), torch.as_tensor(value)), key
    assert [len(group["params"]) for group in mine.param_groups] == [2, 4]


def drifted(steps=400, seed=0, **settings):
    """Return where ones in bfloat16 are after steps that are a 40th of what it can tell apart."""
    optim = pytest.importorskip("torchao.optim")
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = optim._AdamW([parameter], lr=1e-4, weight_decay=0.0, **settings)
    with torch.compiler.set_stance("force_eager"):
        for step in range(steps):
            seed_step(seed, step)
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    return parameter.detach().float()


def test_stochastic_rounding_keeps_what_is_small_and_repeats():
    assert (drifted() == 1).all()  # 1 - 1e-4 rounds to 1
    moved = drifted(bf16_stochastic_round=True)
    # Each of 400 steps goes down by 1e-4, in the mean: 64 * 64 numbers tell it to about 1e-4.
    assert moved.mean().item() == pytest.approx(1 - 400 * 1e-4, abs=5e-4)
    assert moved.std() > 0
    assert torch.equal(moved, drifted(bf16_stochastic_round=True))
    assert not torch.equal(moved, drifted(bf16_stochastic_round=True, seed=1))
