"""NF4 linears under FSDP2: two ranks hold half of the codes each and compute what one does."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mytune.quantization import NF4Linear
from tests.recipes.ranks import SHARES_4_BITS

# 143 blocks: the ranks' parts differ.
WEIGHT = torch.randn(70, 130, generator=torch.Generator().manual_seed(0))


def _rank(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        _check_sharded()
    finally:
        dist.destroy_process_group()


def _check_sharded() -> None:
    alone = NF4Linear(130, 70, device="meta")
    alone.quantize_(WEIGHT)
    linear = NF4Linear(130, 70, device="meta")
    fully_shard(linear, mesh=init_device_mesh("cpu", (2,)))
    linear.quantize_(WEIGHT)
    x = torch.ones(3, 130, requires_grad=True)
    twin = torch.ones(3, 130, requires_grad=True)
    found, expected = linear(x), alone(twin)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, twin.grad)
    for name, parameter in linear.named_parameters():
        whole = getattr(alone, name)
        assert parameter.to_local().numel() < whole.numel() or whole.shape[0] == 1, name
        assert torch.equal(parameter.full_tensor(), whole), name


@SHARES_4_BITS
@pytest.mark.ranks
def test_two_ranks_compute_and_gather_what_one_holds(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path / "store"),), nprocs=2)
