"""What a run will take, before it is run: memory by part, whether it fits, what would make it fit.

The step itself is simulated (`simulate.py`); here are the weights, the optimizer, the ranks.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mytune.modules.decoder import Decoder
from mytune.modules.lora import is_adapter
from mytune.training.activations import checkpoint_activations
from mytune.training.planning.optimizer_size import optimizer_size
from mytune.training.planning.simulate import (
    StepSettings,
    set_meta_dtype,
    simulate_step,
)

Loss = Callable[[Any, Any], Tensor]

GIB = 2**30
# What CUDA's context and libraries take of a device, and what the allocator cannot use of the rest;
# on the CPU, what Python and torch take.
_CONTEXT = {"cpu": 0.4 * GIB}
_OTHER_CONTEXT = 0.6 * GIB
_UNUSABLE = 0.02


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device at the peak of a step, by part, and the most of each at any time.

    `moment` is the phase that the peak is in, `memory` what the device has.
    """

    parts: dict[str, int]
    most: dict[str, int]
    moment: str
    device: str
    memory: int | None = None

    @property
    def peak(self) -> int:
        """What tensors take at the peak: `torch.cuda.max_memory_allocated`."""
        return sum(self.parts.values())

    @property
    def reserve(self) -> int:
        """What the device's context and the allocator take beside tensors."""
        return int(_CONTEXT.get(self.device, _OTHER_CONTEXT) + _UNUSABLE * self.peak)

    @property
    def needed(self) -> int:
        """Bytes at the peak, with what Python, torch and the device's libraries take."""
        return self.peak + self.reserve

    @property
    def fits(self) -> bool | None:
        """Whether the device has room; None if its memory is unknown."""
        return None if self.memory is None else self.needed <= self.memory


def plan_memory(
    model: Decoder, loss_fn: Loss, settings: StepSettings, memory: int | None = None
) -> MemoryPlan:
    """Return what a step of `model` takes on each device; nothing is allocated.

    Args:
        model: on the meta device, as built: not recomputed or sharded. It is not changed.
        loss_fn: called with model and batch, as in the run.
        memory: bytes of a device, for `MemoryPlan.fits`.
    """
    model = copy.deepcopy(model)
    set_meta_dtype(model, settings.dtype)
    resident = _resident(model, settings)
    gathered = _gathered(model, settings)
    trained = _nbytes(model, trained=True)
    optimizer = optimizer_size(
        settings.optimizer, model, settings.device, settings.optimizer_in_bwd
    )
    model.train()
    checkpoint_activations(model, settings.recompute, settings.keep_products)
    step = simulate_step(model, loss_fn, settings)

    resident["optimizer state"] = int(optimizer.state * settings.share)
    gradients = 0 if settings.optimizer_in_bwd else trained * settings.share
    update = {"gradients": int(gradients), "working": int(optimizer.step * settings.share)}
    most = {**resident, **step.most, "gathered": gathered}
    most["gradients"] = max(most.get("gradients", 0), update["gradients"])
    if sum(update.values()) > sum(step.parts.values()) + gathered:
        parts, moment = {**resident, **update}, "optimizer"
    else:
        parts, moment = {**resident, **step.parts, "gathered": gathered}, step.moment
    return MemoryPlan(parts, most, moment, settings.device, memory)


def _resident(model: nn.Module, settings: StepSettings) -> dict[str, int]:
    """Return the bytes of weights and adapters that stay on a device."""
    sizes = {"weights": 0, "adapters": 0}
    for name, parameter in model.named_parameters():
        sizes["adapters" if is_adapter(name) else "weights"] += parameter.nbytes
    return {part: int(size * settings.share) for part, size in sizes.items()}


def _gathered(model: Decoder, settings: StepSettings) -> int:
    """Return the bytes of whole weights and gradients that a device holds beside its shards.

    The block at work and the next one; the gradients of the one before, and their float32 sum on
    its way; and, all the time, what is outside blocks.
    """
    if settings.shard_ranks == 1:
        return 0
    blocks = [_nbytes(layer) for layer in model.layers]
    trained = max(_nbytes(layer, trained=True) for layer in model.layers)
    sums = max(
        sum(4 * p.numel() for p in layer.parameters() if p.requires_grad) for layer in model.layers
    )
    outside = _nbytes(model) - sum(blocks)
    outside += _nbytes(model, trained=True) - sum(_nbytes(b, trained=True) for b in model.layers)
    return outside + (2 * max(blocks) if settings.reshard else sum(blocks)) + trained + sums


def _nbytes(module: nn.Module, trained: bool = False) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad or not trained)


def fewest_recomputed_blocks(
    model: Decoder, loss_fn: Loss, settings: StepSettings, memory: int
) -> range:
    """Return the blocks to recompute so that a step fits: as few as possible, all if none fits.

    They are the first ones: when their turn to be recomputed comes in the backward pass, the later
    ones, which are not, have let go of what they kept.
    """

    def spare(count: int) -> int:
        tried = replace(settings, recompute=range(count))
        return memory - plan_memory(model, loss_fn, tried).needed

    few, many = 0, len(model.layers)
    room, room_of_all = spare(few), spare(many)
    if room >= 0:
        return range(few)
    if room_of_all < 0:
        return range(many)
    while many - few > 1:  # memory is nearly linear in the blocks, so the first guess is good
        guess = few + round((many - few) * -room / (room_of_all - room))
        guess = min(max(guess, few + 1), many - 1)
        found = spare(guess)
        if found >= 0:
            many, room_of_all = guess, found
        else:
            few, room = guess, found
    return range(many)


def fewest_ranks(model: Decoder, loss_fn: Loss, settings: StepSettings, memory: int) -> int | None:
    """Return how many ranks must share the model so that a step fits; None if 1024 are too few.

    Only powers of two are tried, as devices come in these.
    """
    alone = plan_memory(model, loss_fn, replace(settings, shard_ranks=1))
    kept = ("weights", "adapters", "optimizer state")
    shared = sum(alone.parts.get(part, 0) for part in kept)
    for ranks in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        tried = replace(settings, shard_ranks=ranks)
        if shared / ranks <= memory and plan_memory(model, loss_fn, tried, memory).fits:
            return ranks
    return None


def device_memory(device: torch.device, given_gib: float | None = None) -> int | None:
    """Return the bytes of memory of a device, or those given; None if it is not known."""
    if given_gib is not None:
        return int(given_gib * GIB)
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        there = module.is_available()
        return int(module.get_device_properties(device).total_memory) if there else None
    if device.type == "mps":
        there = torch.backends.mps.is_available()
        return int(torch.mps.recommended_max_memory()) if there else None
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
