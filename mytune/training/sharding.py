"""How ranks hold a model: whole each, shared out by rows (FSDP2), or copies of what groups share.

Where each rank holds it whole, `sum_gradients` sums gradients once per step; else FSDP2 does.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from mytune.errors import ConfigError, ResourceError
from mytune.modules.decoder import Decoder
from mytune.training.distributed import world_size

log = logging.getLogger("mytune")


def ranks_per_copy(shard: int | None, replicate: int | None, *, fits: bool) -> int:
    """Return how many ranks share one copy of the model.

    Args:
        shard: ranks that share a copy; -1 for all that `replicate` leaves. None: 1 if the model
            `fits` on every rank, else -1.
        replicate: copies; None for as many as `shard` leaves room for.

    Raises:
        ConfigError: the two do not make up the number of processes.
    """
    processes = world_size()
    if shard is None:
        shard = -1 if replicate is not None or not fits else 1
    if shard == -1:
        shard = max(1, processes // max(1, replicate or 1))
    if replicate is None:
        replicate = max(1, processes // max(1, shard))
    if shard < 1 or replicate * shard != processes:
        raise ConfigError(
            f"data_parallel_replicate_dim x data_parallel_shard_dim is {replicate} x {shard}, and "
            f"there are {processes} processes; set data_parallel_shard_dim=-1 to share the model "
            "among all that the copies leave"
        )
    return shard


def is_sharded(model: nn.Module) -> bool:
    """Say whether ranks hold a part of a model each, and so must run it in step."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shard_model(
    model: Decoder,
    device: torch.device,
    ranks: int,
    *,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Share each copy of a model on the meta device out over `ranks`, block by block, in place.

    By FSDP2; one rank alone holds its copy whole. The embedding, the norm and the head are one
    group, which stays gathered from the forward to the end of the backward pass: the loss reads the
    head after the forward.

    Args:
        reshard_after_forward: let go of a block's gathered weights until the backward pass.
        cpu_offload: keep weights, gradients and optimizer state in the CPU's memory.

    Raises:
        ResourceError: 4-bit weights, and a torch that cannot share them out.
    """
    copies = world_size() // ranks
    if world_size() > 1:
        log.info("copies of the model: %d, each shared by %d ranks", copies, ranks)
    if ranks == 1:
        return
    if torch.__version__ < "2.12" and not all(p.is_floating_point() for p in model.parameters()):
        raise ResourceError(
            f"torch {torch.__version__} cannot share 4-bit weights among ranks; install torch 2.12 "
            "or newer, or let every rank hold them all with data_parallel_shard_dim=1"
        )
    mesh = init_device_mesh(device.type, (copies, ranks), mesh_dim_names=("copy", "shard"))
    mesh = mesh if copies > 1 else mesh["shard"]
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if cpu_offload and device.type != "cpu" else OffloadPolicy()
    for module in (*model.layers, model):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward and module is not model,
            mp_policy=precision,
            offload_policy=offload,
        )
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules whose parameters are gathered and shared out together."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Let the next backward pass sum a sharded model's gradients over the ranks, or keep them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered."""
    for module in sharded_modules(model):
        module.reshard()
