"""Gradient norm, clipping, the check for NaN; plain, in bfloat16 and sharded."""

from __future__ import annotations

import math
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from mytune.errors import ConfigError, NumericalError
from mytune.training.grad import check_finite, clip_grad_norm


def parameters(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((33, 17), (129,), (5, 7, 3)):
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = (torch.randn(shape, generator=generator) * scale).to(dtype)
        made.append(parameter)
    return [*made, torch.nn.Parameter(torch.zeros(3))]  # one without a gradient


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 50])
def test_clipping_is_torchs_bit_for_bit(scale, max_norm):
    ours, theirs = parameters(scale=scale), parameters(scale=scale)
    norm = clip_grad_norm(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.shape == () and norm.dtype == torch.float32
    assert torch.equal(norm, expected)
    for mine, its in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.equal(mine.grad, its.grad)


@pytest.mark.parametrize("max_norm", [None, float("inf")])
def test_without_a_limit_the_norm_is_known_and_nothing_changes(max_norm):
    ours = parameters()
    before = [p.grad.clone() for p in ours[:-1]]
    expected = torch.cat([g.flatten() for g in before]).norm()
    torch.testing.assert_close(clip_grad_norm(ours, max_norm), expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=False))


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32():
    ours = parameters(torch.bfloat16)
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in ours[:-1]))
    assert float(clip_grad_norm(ours, 1.0)) == pytest.approx(exact, rel=1e-6)
    assert ours[0].grad.dtype == torch.bfloat16
    assert float(clip_grad_norm(ours, None)) == pytest.approx(1.0, rel=1e-2)


def test_no_gradient_is_a_norm_of_zero():
    assert clip_grad_norm(iter([torch.nn.Parameter(torch.ones(2))]), 1.0).item() == 0


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_a_limit_that_is_not_above_zero_is_a_config_error(max_norm):
    with pytest.raises(ConfigError, match="clip_grad_norm is"):
        clip_grad_norm(parameters(), max_norm)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_numbers_that_are_not_finite_stop_the_run(wrong, where):
    values = [torch.tensor(1.5), torch.tensor(2.5)]
    assert check_finite(*values, step=3) == (1.5, 2.5)
    values[where].fill_(wrong)
    with pytest.raises(NumericalError, match=rf"step 3: .*{wrong}.*rows \[32, 47\]") as error:
        check_finite(*values, step=3, rows=[32, 47])
    assert error.value.exit_code == 6


def test_a_nan_gradient_shows_in_the_norm_also_when_clipped():
    ours = parameters()
    ours[1].grad[5] = float("nan")
    with pytest.raises(NumericalError):
        check_finite(torch.tensor(1.0), clip_grad_norm(ours, 1.0), step=1)


def gradients(sharded: bool) -> tuple[float, torch.Tensor]:
    """Return norm and first layer's clipped gradient of a small model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 3, bias=False))
    plain = torch.nn.Parameter(torch.ones(4))  # stays whole, as replicated adapters do
    if sharded:
        fully_shard(model)
    model(torch.arange(18.0).view(2, 9)).square().sum().backward()
    plain.grad = torch.full((4,), 2.0)
    norm = clip_grad_norm([plain, *model.parameters()], 0.5)
    grad = model[0].weight.grad
    return norm.item(), grad.full_tensor() if sharded else grad


def on_two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=30), world_size=2, rank=rank
    )
    torch.save(gradients(sharded=True), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ranks
def test_sharded_gradients_count_whole(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(on_two_ranks, (str(tmp_path),), nprocs=2, start_method="spawn")
    norm, grad = gradients(sharded=False)
    for rank in range(2):
        sharded_norm, sharded_grad = torch.load(tmp_path / f"{rank}.pt")
        assert sharded_norm == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(sharded_grad, grad, rtol=1e-6, atol=1e-9)
