"""PyTorch's profiler around the training steps, as a component of the config."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mytune.errors import ConfigError, check_at_least
from mytune.training.distributed import rank

log = logging.getLogger("mytune")


class NoProfiler(AbstractContextManager["NoProfiler"]):
    """A profiler that is switched off."""

    def __exit__(self, *exception: object) -> None:
        """Do nothing."""

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

    After every cycle of waiting, warming up and recording it writes a Chrome trace,
    `trace_rank<r>_step<n>.json.gz`, and beside it a table of the costliest operations as `.txt`.
    """
    if not enabled:
        return NoProfiler()
    check_at_least(0, {"profiler.wait_steps": wait_steps, "profiler.warmup_steps": warmup_steps})
    check_at_least(1, {"profiler.active_steps": active_steps, "profiler.num_cycles": num_cycles})
    first = wait_steps + warmup_steps + 1
    log.info(
        "profiling steps %d to %d; traces go to %s", first, first + active_steps - 1, output_dir
    )
    return profile(
        activities=_activities(cpu, cuda, xpu),
        schedule=schedule(
            wait=wait_steps, warmup=warmup_steps, active=active_steps, repeat=num_cycles
        ),
        on_trace_ready=lambda recorded: _write(recorded, Path(output_dir).expanduser()),
        profile_memory=profile_memory,
        with_stack=with_stack,
        record_shapes=record_shapes,
        with_flops=with_flops,
    )


def _activities(cpu: bool, cuda: bool, xpu: bool) -> list[ProfilerActivity]:
    """Return what to watch: what is asked for and there."""
    wanted = (
        (cpu, ProfilerActivity.CPU),
        (cuda and torch.cuda.is_available(), ProfilerActivity.CUDA),
        (xpu and torch.xpu.is_available(), ProfilerActivity.XPU),
    )
    activities = [activity for watch, activity in wanted if watch]
    if not activities:
        raise ConfigError("profiler has nothing to watch on this machine; set profiler.cpu=true")
    return activities


def _write(recorded: profile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trace_rank{rank()}_step{recorded.step_num}"
    recorded.export_chrome_trace(f"{path}.json.gz")
    on_device = any(a is not ProfilerActivity.CPU for a in recorded.activities or ())
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=30)
    Path(f"{path}.txt").write_text(table, encoding="utf-8")
    log.info("profile: %s.json.gz (ui.perfetto.dev shows it) and %s.txt", path, path)
