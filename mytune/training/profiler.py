"""PyTorch's profiler around the training steps, as a component of the config."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mytune.errors import ConfigError
from mytune.training.distributed import rank

log = logging.getLogger("mytune")


class NoProfiler(nullcontext[None]):
    """A profiler that is switched off."""

    def step(self) -> None:
        """Do nothing."""


def setup_torch_profiler(
    enabled: bool = False,
    output_dir: str = "profiler_output",
    cpu: bool = True,
    cuda: bool = True,
    xpu: bool = True,
    profile_memory: bool = False,
    with_stack: bool = False,
    record_shapes: bool = True,
    with_flops: bool = False,
    wait_steps: int = 5,
    warmup_steps: int = 3,
    active_steps: int = 2,
    num_cycles: int = 1,
) -> profile | NoProfiler:
    """Return a context whose `step()` is called after each optimizer step.

    After every cycle of waiting, warming up and recording it writes `trace_rank<r>_step<n>.json.gz` (for
    chrome://tracing or ui.perfetto.dev) and a table of the costliest operations as `.txt`.
    """
    if not enabled:
        return NoProfiler()
    steps = {"wait_steps": wait_steps, "warmup_steps": warmup_steps}
    least = {"active_steps": active_steps, "num_cycles": num_cycles}
    wrong = [f"{name} is {n}, at least 0" for name, n in steps.items() if n < 0]
    wrong += [f"{name} is {n}, at least 1" for name, n in least.items() if n < 1]
    if wrong:
        raise ConfigError(f"profiler: it must be that {'; '.join(wrong)}")
    first = wait_steps + warmup_steps + 1
    log.info(
        "profiling steps %d to %d; traces go to %s", first, first + active_steps - 1, output_dir
    )
    return profile(
        activities=_activities(cpu, cuda, xpu),
        schedule=schedule(
            wait=wait_steps, warmup=warmup_steps, active=active_steps, repeat=num_cycles
        ),
        on_trace_ready=lambda recorded: _write(recorded, Path(output_dir)),
        profile_memory=profile_memory,
        with_stack=with_stack,
        record_shapes=record_shapes,
        with_flops=with_flops,
    )
