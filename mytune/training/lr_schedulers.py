"""Learning-rate schedules in closed form: the rate of a step depends on the step's number alone."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mytune.errors import ConfigError, check_at_least

log = logging.getLogger("mytune")


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Rise linearly from 0 to the optimizer's lr, then follow a cosine; half a cycle ends at 0.

    `min_lr_ratio` times the lr is the lowest after the rise, in place of 0.

    Step 0 has lr 0 and the peak is at step `num_warmup_steps`; below 1, that is a share of all
    steps. To resume after n steps give the optimizer with its full lr and `last_epoch=n - 1`, or
    see `advanced`.
    """
    if not 0 < num_cycles < 1e9:
        raise ConfigError(f"num_cycles is {num_cycles}; 0.5 falls to 0 once; it must be above 0")

    def after_warmup(progress: float) -> float:
        return 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress))

    return _schedule(
        optimizer, num_warmup_steps, num_training_steps, after_warmup, last_epoch, min_lr_ratio
    )


def get_linear_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: int,
    last_epoch: int = -1,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Rise linearly from 0 to the optimizer's lr, then fall linearly to 0 after the last step.

    Or to `min_lr_ratio` times the lr.
    """

    def after_warmup(progress: float) -> float:
        return 1 - progress

    return _schedule(
        optimizer, num_warmup_steps, num_training_steps, after_warmup, last_epoch, min_lr_ratio
    )


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: float, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Rise linearly from 0 to the optimizer's lr and stay there."""
    return _schedule(
        optimizer, num_warmup_steps, num_training_steps, lambda progress: 1.0, last_epoch
    )


def _schedule(
    optimizer: Optimizer,
    warmup: float,
    total: int,
    after_warmup: Callable[[float], float],
    last_epoch: int,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Return a ramp and then `after_warmup(progress)`, progress going from 0 to 1."""
    if not 0 <= min_lr_ratio <= 1:
        raise ConfigError(f"lr_scheduler: min_lr_ratio is {min_lr_ratio}; it must be from 0 to 1")
    if warmup < 0 or (warmup > 1 and warmup % 1):
        raise ConfigError(
            f"lr_scheduler: num_warmup_steps is {warmup}; it must be a whole number, or below 1 a "
            "share of all steps"
        )
    warmup = round(warmup * total) if warmup < 1 else int(warmup)
    check_at_least(1, {"lr_scheduler: num_training_steps": total})
    check_at_least(-1, {"lr_scheduler: last_epoch": last_epoch})
    if warmup >= total:
        log.warning(
            "lr_scheduler.num_warmup_steps is %d of the run's %d steps: lr never reaches its peak",
            warmup,
            total,
        )

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        share = after_warmup(min(1.0, (step - warmup) / max(1, total - warmup)))
        return min_lr_ratio + (1 - min_lr_ratio) * share

    for group in optimizer.param_groups:  # torch asks for it where last_epoch is given
        lr = group["lr"]  # where it is a tensor, it is changed in place
        group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
    return LambdaLR(optimizer, factor, last_epoch)


def advanced(build: Callable[[], LRScheduler], optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return the schedule that `build` makes for an optimizer, as it is after so many steps.

    It takes them anew from the first rates: a torch schedule need not be in closed form, and its
    state need not be stored.
    """
    for group in optimizer.param_groups:
        first = group.get("initial_lr", group["lr"])
        group["lr"] = first.clone() if isinstance(first, Tensor) else first
    schedule = build()
    with warnings.catch_warnings():  # the optimizer's own steps were taken before
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            schedule.step()
    return schedule


def get_lr(optimizer: Optimizer) -> float:
    """Return the learning rate of the next step (of the first parameter group, if they differ)."""
    return float(optimizer.param_groups[0]["lr"])
