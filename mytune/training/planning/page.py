"""A plan as a page for people: the model, the steps, the memory, and whether it fits."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mytune.quantization.nf4 import NF4Linear
from mytune.training.planning.plan import GIB, MemoryPlan
from mytune.training.planning.simulate import StepSettings
from mytune.training.prepare import count_parameters

_MOMENTS = {
    "activations": "in the forward pass",
    "loss": "at the loss",
    "working": "in the backward pass",
    "optimizer": "at the optimizer's step",
}
# Part, its name, what it is, and whether it is shown when it is nothing.
_PARTS = [
    ("weights", "weights", "{weights}", True),
    ("adapters", "adapters", "float32", False),
    ("optimizer state", "optimizer state", "{optimizer}", True),
    ("gradients", "gradients", "of what trains", True),
    ("activations", "activations", "{recompute}", True),
    ("loss", "logits and loss", "a chunk of rows at a time", True),
    ("working", "working memory", "of the block at work", True),
    ("gathered", "gathered", "blocks at work, embedding and head are whole", False),
]
_BAR = 30


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run goes through. `unknown` says why rows and steps are not known."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    steps_per_epoch: int = 0
    epochs: int = 1
    unknown: str = ""


def measured_speed(output_dir: str, model: nn.Module) -> float | None:
    """Return trained tokens per second and device of an earlier run of such a model, or None.

    `output_dir` is where that run left its summary.json.
    """
    try:
        summary = json.loads((Path(output_dir).expanduser() / "summary.json").read_text())
        same = (summary["parameters"], summary["parameters_trained"]) == count_parameters(model)
        return float(summary["tokens_per_second"]) / summary["world_size"] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe_plan(
    plan: MemoryPlan,
    settings: StepSettings,
    model: nn.Module,
    facts: RunFacts,
    *,
    world_size: int = 1,
    speed: float | None = None,
) -> str:
    """Return the page.

    Args:
        model: as built, on the meta device.
        speed: trained tokens per second and device, measured.
    """
    total, trained = count_parameters(model)
    rows = [
        ("model", f"{total:,} parameters, {trained:,} trained ({trained / total:.2%})"),
        ("step", _step(settings, world_size)),
        *_run(facts, settings, speed and speed * world_size),
    ]
    lines = [f"{name:<8}{value}" for name, value in rows]
    moment = _MOMENTS[plan.moment]
    lines += [
        "",
        f"memory of each device when it is fullest, {moment}:",
        *_memory(plan, settings, model),
    ]
    return "\n".join([*lines, "", _verdict(plan)])


def _step(settings: StepSettings, world_size: int) -> str:
    counts = [
        (settings.batch_size, "row"),
        (settings.seq_len, "token"),
        (settings.gradient_accumulation_steps, "micro-batch"),
        (world_size, "device"),
    ]
    shown = " x ".join(_number(count, what) for count, what in counts)
    most = "" if settings.packed else "at most "
    return f"{shown} = {most}{math.prod(count for count, _ in counts):,} tokens"


def _number(count: int, what: str) -> str:
    plural = "es" if what.endswith("batch") else "s"
    return f"{count:,} {what}{plural if count != 1 else ''}"


def _run(facts: RunFacts, settings: StepSettings, speed: float | None) -> list[tuple[str, str]]:
    if facts.unknown:
        length = f"rows of {settings.seq_len:,} tokens are planned for; tokenizer.max_seq_len=N"
        return [
            ("data", f"unknown: {facts.unknown}"),
            ("", f"{length} plans for others"),
            ("steps", "unknown"),
            ("time", "unknown"),
        ]
    trained = facts.trained_tokens * facts.epochs
    time = "unknown until a run has left its speed in output_dir (summary.json)"
    if speed:
        how = "at the speed of the last run there"
        time = f"about {_duration(trained / speed)} {how}, {speed:,.0f} trained tokens/s"
    data = (
        f"{_number(facts.rows, 'row')}, {facts.tokens:,} tokens, {facts.trained_tokens:,} trained"
    )
    steps = f"{facts.steps_per_epoch * facts.epochs:,} in {_number(facts.epochs, 'epoch')}"
    return [("data", f"{data} in an epoch"), ("steps", steps), ("time", time)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _memory(plan: MemoryPlan, settings: StepSettings, model: nn.Module) -> list[str]:
    unit, name = (GIB, "GiB") if plan.needed >= GIB else (2**20, "MiB")
    words = _words(settings, model)
    parts = [
        (title, plan.parts.get(part, 0), plan.most.get(part, 0), what.format(**words))
        for part, title, what, always in _PARTS
        if always or plan.most.get(part)
    ]
    largest = max(size for _, size, *_ in parts) or 1
    lines = [f"{'':<18}{name:>10}"]
    for title, size, most, what in parts:
        bar = "#" * round(_BAR * size / largest)
        at_most = f", at most {most / unit:,.2f}, at another moment" if most > 1.05 * size else ""
        lines.append(f"  {title:<16}{size / unit:>10,.2f}  {bar:<{_BAR}}  {what}{at_most}")
    lines.append(f"  {'peak':<16}{plan.peak / unit:>10,.2f}")
    lines.append(f"  {'reserve':<16}{plan.reserve / unit:>10,.2f}  {_reserve(plan.device)}")
    return [*lines, f"  {'needed':<16}{plan.needed / unit:>10,.2f}"]


def _words(settings: StepSettings, model: nn.Module) -> dict[str, str]:
    dtype = str(settings.dtype).removeprefix("torch.")
    four_bits = any(isinstance(module, NF4Linear) for module in model.modules())
    shared = f", shared by {settings.shard_ranks} devices" if settings.shard_ranks > 1 else ""
    blocks = len(settings.recompute)
    return {
        "weights": ("4-bit and " if four_bits else "") + dtype + shared,
        "optimizer": str(settings.optimizer["_component_"]).rpartition(".")[2],
        "recompute": f"{_number(blocks, 'block')} recomputed" if blocks else "all kept",
    }


def _reserve(device: str) -> str:
    what = "Python and torch" if device == "cpu" else f"{device}'s context and libraries"
    return f"{what}, what the allocator loses"


def _verdict(plan: MemoryPlan) -> str:
    if plan.memory is None:
        return (
            f"There is no {plan.device} here, so whether it fits is unknown: device_memory=80 asks"
            " for one of 80 GiB."
        )
    fits = "It fits" if plan.fits else "It does not fit"
    return f"{fits}: {plan.needed / GIB:,.2f} of {plan.memory / GIB:,.2f} GiB."
