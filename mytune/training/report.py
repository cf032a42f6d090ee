"""The end of a run in two files: `summary.json` and the picture `loss_curve.png`."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mytune import versions
from mytune.training.device import describe_device
from mytune.training.disk import write_atomic
from mytune.training.distributed import rank, world_size
from mytune.training.memory import memory_stats
from mytune.training.metric_logging import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger("mytune")

Row = Mapping[str, Any]


def write_report(
    output_dir: str | Path,
    *,
    steps: int,
    tokens: int,
    seconds: float,
    parameters: tuple[int, int],
    device: torch.device,
    locations: Mapping[str, str | Path] | None = None,
    metrics: str | Path | None = None,
) -> dict[str, Path]:
    """Write summary and loss curve of a run, on rank 0 only.

    Args:
        steps: optimizer steps of the whole run.
        tokens: tokens trained on in `seconds`, by all ranks.
        parameters: how many there are, how many of them train.
        locations: what else the run has written, by name.
        metrics: a DiskLogger's file.

    Returns:
        The files written, by name.
    """
    if rank() != 0:
        return {}
    folder = Path(output_dir).expanduser()
    rows = read_metrics(Path(metrics)) if metrics else []
    written = {"summary": folder / "summary.json"}
    if curve := draw_loss_curve(rows, folder.name):
        written["loss_curve"] = folder / "loss_curve.png"
        write_atomic(written["loss_curve"], curve)
    summary = {
        **_results(rows),
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds > 0 else None,
        **_peaks([*rows, memory_stats(device)]),
        "parameters": parameters[0],
        "parameters_trained": parameters[1],
        "device": describe_device(device),
        "world_size": world_size(),
        "versions": versions("torch"),
        "locations": {name: str(p) for name, p in {**(locations or {}), **written}.items()},
    }
    write_atomic(written["summary"], (json.dumps(summary, indent=2) + "\n").encode())
    return written


def _results(rows: Sequence[Row]) -> dict[str, float | int]:
    """Return the last and the best training and validation loss, and the best one's step."""
    results: dict[str, float | int] = {}
    for name in ("loss", "val_loss"):
        if points := _points(rows, name):
            best = min(points, key=lambda point: point[1])
            results |= {f"final_{name}": points[-1][1], f"best_{name}": best[1]}
            results[f"best_{name}_step"] = best[0]
    return results


def _peaks(rows: Sequence[Row]) -> dict[str, float]:
    """Return the largest of each memory figure."""
    peaks: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("peak_memory_", "memory_")) and isinstance(value, int | float):
                peaks[name] = max(peaks.get(name, 0.0), value)
    return peaks


def _points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def draw_loss_curve(rows: Sequence[Row], title: str = "") -> bytes | None:
    """Return a PNG of losses and learning rate over the steps.

    None, and a line in the log, where there is nothing to draw or no matplotlib.
    """
    if not _points(rows, "loss"):
        log.info(
            "no loss curve: no metrics.jsonl with losses (mytune.training.DiskLogger writes it)"
        )
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no loss curve: for the picture run: pip install matplotlib")
        return None
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    _draw_losses(upper, rows)
    lower.plot(*_columns(_points(rows, "lr")), color="#6b7280", linewidth=1.4)
    lower.set(xlabel="optimizer step", ylabel="learning rate")
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.set_title(title, loc="left", fontweight="bold")
    for axes in (upper, lower):
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_losses(axes: Axes, rows: Sequence[Row]) -> None:
    steps, losses = _columns(_points(rows, "loss"))
    many = len(steps) > 20
    axes.plot(
        steps,
        losses,
        color="#93c5fd" if many else "#1d4ed8",
        linewidth=1.0 if many else 1.8,
        marker=None if many else "o",
        markersize=3,
        label="training",
    )
    if many:
        axes.plot(
            steps, _smooth(losses), color="#1d4ed8", linewidth=1.8, label="training, smoothed"
        )
    if validation := _points(rows, "val_loss"):
        axes.plot(
            *_columns(validation),
            "o-",
            color="#ea580c",
            linewidth=1.4,
            markersize=5,
            label="validation",
        )
    axes.set_ylabel("loss per token")
    axes.legend(frameon=False)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Return the mean around each point, over a twentieth of all points (fewer at the ends)."""
    index, half = np.arange(len(values)), len(values) // 40 + 1
    first = np.maximum(index - half, 0)
    after = np.minimum(index + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    mean: np.ndarray = (sums[after] - sums[first]) / (after - first)
    return mean
