"""Loading a checkpoint until every weight has been read, and saving it, on the CPU; bfloat16, each
in a process of its own. Memory is the peak above what the process held before (for saving, the
loaded model). mytune's saving also hashes, fsyncs and reads everything back; transformers' does
none of that.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mytune.models import sizes_of_checkpoint
from mytune.modules.decoder import Decoder
from mytune.training.checkpointing.checkpointers import (
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
)
from mytune.training.checkpointing.formats import META
from mytune.training.memory import memory_stats, reset_peak_memory
from mytune.training.prepare import load_weights
from tests.benchmarks.common import THREADS, Row
from tests.benchmarks.model import SHAPES, Shape, write_model

TITLE = "Checkpoints"
LARGE = Shape(32_000, 16, 16, 8, 1024, 4096)
CPU = torch.device("cpu")


def measure(quick: bool) -> list[Row]:
    """Return a row per format, library and direction."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as home:
        folders = {"HF": Path(home) / "hf", "Meta": Path(home) / "meta"}
        write_model(folders["HF"], SHAPES["wide"] if quick else LARGE)
        write_meta(folders["HF"], folders["Meta"])
        return [
            row
            for (kind, library), work in WORKS.items()
            for row in rows(kind, library, work, folders[kind], turns=1 if quick else 5)
        ]


def rows(kind: str, library: str, work: Any, folder: Path, turns: int) -> list[Row]:
    """Return a row for loading and one for saving, medians of `turns` processes."""
    size = sum(p.stat().st_size for p in folder.iterdir() if p.stat().st_size > 2**20)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        said = [pool.apply(run, (work, folder)) for _ in range(turns)]
    return [
        {
            "format": kind,
            "library": library,
            "direction": direction,
            "file, MiB": size / 2**20,
            "seconds": statistics.median(one[i][0] for one in said),
            "MiB per second": size / 2**20 / statistics.median(one[i][0] for one in said),
            "peak memory / file size": statistics.median(one[i][1] for one in said) / size,
        }
        for i, direction in enumerate(("load", "save"))
    ]


def run(work: Callable[[Path, Path], Any], folder: Path) -> list[tuple[float, float]]:
    """Load, then save; return seconds and bytes of peak memory of each."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        steps = work(folder, Path(out))
        return [timed(lambda: next(steps)) for _ in range(2)]


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds and bytes of peak memory above what was held before."""
    reset_peak_memory(CPU)
    before, start = memory_stats(CPU)["peak_memory_rss"], time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds, (memory_stats(CPU)["peak_memory_rss"] - before) * 2**30


def touch(model: nn.Module) -> None:
    """Read every weight once: mapped files are not read before that."""
    for parameter in model.parameters():
        parameter.detach().view(torch.int16).max()


def ours(cls: Any, folder: Path, out: Path) -> Any:
    """Load, then save."""
    checkpointer = cls(str(folder), output_dir=str(out))
    config = sizes_of_checkpoint(str(folder))
    with torch.device("meta"):
        model = Decoder(config)
    load_weights(model, checkpointer.weights(config), CPU, torch.bfloat16)
    touch(model)
    yield
    weights = dict(model.named_parameters())
    yield checkpointer.save("epoch_0", step=1, dtype=torch.bfloat16, weights=weights, config=config)


def ours_hf(folder: Path, out: Path) -> Any:
    return ours(FullModelHFCheckpointer, folder, out)


def ours_meta(folder: Path, out: Path) -> Any:
    return ours(FullModelMetaCheckpointer, folder, out)


def transformers(folder: Path, out: Path) -> Any:
    """Load, then save."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    touch(model)
    yield
    yield model.save_pretrained(out)


def write_meta(hf: Path, folder: Path) -> None:
    """Write the same weights as Meta would."""
    config = sizes_of_checkpoint(str(hf))
    table, weights = META.table, FullModelHFCheckpointer(str(hf)).weights(config)
    folder.mkdir()
    state = {table.theirs(n): table.row(n).to_theirs(t, config) for n, t in weights.items()}
    torch.save(state, folder / "consolidated.00.pth")
    (folder / "config.json").write_text((hf / "config.json").read_text())  # it holds the sizes


WORKS = {
    ("HF", "mytune"): ours_hf,
    ("HF", "transformers"): transformers,
    ("Meta", "mytune"): ours_meta,
}
