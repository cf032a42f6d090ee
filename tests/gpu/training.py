"""Training cases: the fine-tuning recipe itself, over random weights and rows, case by case."""

from __future__ import annotations

import gc
import io
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from mytune.cli import run
from mytune.modules.decoder import DecoderConfig
from mytune.training.metric_logging import read_metrics
from tests.gpu import DEVICE, TINY
from tests.gpu.flops import flop_per_token
from tests.gpu.parts import Enough, arguments, sizes

BATCH = 2
WARM_UP, TIMED = 3, 5  # steps; the first ones compile
LORA = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 16,
    "lora_alpha": 32,
}
MODELS = {
    "LoRA": ("lora_llama3", LORA),
    "QLoRA": ("qlora_llama3", LORA),
    "QLoRA, embeddings too": ("qlora_llama3", {**LORA, "quantize_embeddings": True}),
    "full": ("llama3", {}),
}
OFF, RECOMPUTE = {}, {"enable_activation_checkpointing": True}
PRODUCTS = {"ac_mode": "selective", "ac_option": "op"}
COMPILED = {"compile": True}
WHOLE_LOGITS = {"loss": {"_component_": "tests.gpu.parts.WholeLogits"}}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A method, a length, the levers that are pulled, and those keys of the config.

    `blocks` are those of the model, if it does not have all of them.
    """

    method: str
    length: int
    levers: str
    keys: dict[str, Any] = field(default_factory=dict)
    document: int | None = None
    blocks: int | None = None

    @property
    def sizes(self) -> DecoderConfig:
        return sizes(self.blocks)

    @property
    def name(self) -> str:
        return f"{self.method}, {self.blocks} blocks" if self.blocks else self.method

    @property
    def recipe(self) -> str:
        return f"{'full' if self.method == 'full' else 'lora'}_finetune_single_device"


# The most telling first: there may be no time for all.
CASES = [
    Case("LoRA", 4096, "compile", COMPILED, blocks=8),
    Case("LoRA", 4096, "compile", COMPILED),
    Case("QLoRA", 2048, "compile, recompute", COMPILED | RECOMPUTE),
    Case("LoRA", 2048, "compile, recompute", COMPILED | RECOMPUTE),
    Case("full", 4096, "compile, recompute", COMPILED | RECOMPUTE),
    Case("LoRA", 4096, "none", OFF),
    Case("LoRA", 4096, "compile, recompute", COMPILED | RECOMPUTE),
    Case("LoRA", 4096, "compile, packed documents of 512", COMPILED, document=512),
    Case("QLoRA", 4096, "compile, recompute", COMPILED | RECOMPUTE),
    Case("LoRA", 4096, "compile, keep products", COMPILED | PRODUCTS),
    Case("LoRA", 4096, "compile, whole logits", COMPILED | WHOLE_LOGITS),
    Case("LoRA", 8192, "compile", COMPILED),
    Case("QLoRA, embeddings too", 2048, "compile, recompute", COMPILED | RECOMPUTE),
    Case("full", 2048, "compile, recompute", COMPILED | RECOMPUTE),
    Case("full", 8192, "compile, recompute", COMPILED | RECOMPUTE),
    Case("QLoRA", 4096, "compile", COMPILED),
    Case("LoRA", 8192, "compile, packed documents of 512", COMPILED, document=512),
    Case("QLoRA", 8192, "compile, recompute", COMPILED | RECOMPUTE),
    Case("LoRA", 2048, "compile", COMPILED),
    Case("LoRA", 8192, "compile, recompute", COMPILED | RECOMPUTE),
    Case("full", 4096, "compile, keep products", COMPILED | PRODUCTS),
    Case("LoRA", 4096, "recompute", RECOMPUTE),
    Case("LoRA", 8192, "packed documents of 512", OFF, document=512),
    Case("full", 4096, "recompute", RECOMPUTE),
]
SHORT = 64  # a length for a CPU


def measure(case: Case, product_rate: float) -> Row:
    """Run a case; return its speed and memory, or why there is none.

    Args:
        product_rate: FLOP per second of plain matrix products on this device.
    """
    length = SHORT if TINY else case.length
    metrics, problem = run_recipe(case, length)
    timed = metrics[WARM_UP:]
    speed = statistics.median(m["tokens_per_second_per_gpu"] for m in timed) if timed else None
    rank = "full" if case.method == "full" else LORA["lora_rank"]
    work = flop_per_token(case.sizes, length, rank)
    return {
        "method": case.name,
        "batch": f"{BATCH} x {length}",
        "levers": case.levers,
        "tokens/s": speed,
        "MFU, %": speed and 100 * speed * work / product_rate,
        "peak, GiB": max((peak(m) for m in metrics), default=None),
        "result": problem or "measured",
    }


def peak(metrics: Row) -> float:
    """Return the most memory that a step tells of, in GiB: allocated, or on a CPU resident."""
    names = ("peak_memory_alloc", "peak_memory_rss")
    return max(metrics[name] for name in names if name in metrics)


def run_recipe(case: Case, length: int) -> tuple[list[Row], str]:
    """Run the recipe for some steps; return each step's metrics, and what went wrong."""
    gc.collect()
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config(case, length, folder)))
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            problem = attempt(lambda: execute(case.recipe, file))
        metrics = Path(folder) / "metrics.jsonl"
        return (read_metrics(metrics) if metrics.exists() else []), problem


def execute(name: str, file: Path) -> None:
    """Do what `tune run` does, but for asking for room on the disk, where nothing is saved."""
    job = run.parse([name, "--config", str(file)])
    loaded = run.load(job)
    recipe = run._import_recipe(job.recipe)
    recipe.check_disk_space = lambda *_: None
    run.execute(job, loaded, recipe)


def attempt(work: Callable[[], Any]) -> str:
    """Do a case's work; return "" or, in one line, why it ended."""
    try:
        work()
    except Enough:
        return ""
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
        return f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return ""


def config(case: Case, length: int, folder: str) -> dict[str, Any]:
    """Return the recipe's config."""
    builder, more = MODELS[case.method]
    return {
        "output_dir": folder,
        "model": {
            "_component_": f"mytune.models.llama3.{builder}",
            **arguments(case.sizes),
            **more,
        },
        "tokenizer": {"_component_": "tests.benchmarks.peers.turns.Ids"},
        "checkpointer": {
            "_component_": "tests.gpu.parts.RandomCheckpointer",
            "device": str(DEVICE),
            "output_dir": folder,
        },
        "dataset": {
            "_component_": "tests.gpu.parts.Rows",
            "length": length,
            "count": BATCH * (WARM_UP + TIMED),
            "document": case.document and min(case.document, length // 4),
        },
        "metric_logger": [
            {"_component_": "mytune.training.metric_logging.DiskLogger", "log_dir": folder},
            {"_component_": "tests.gpu.parts.StopAfter", "steps": WARM_UP + TIMED},
        ],
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-5, "fused": True},
        "batch_size": BATCH,
        "seed": 0,
        "device": DEVICE.type,
        "dtype": "bf16",
        "overwrite_output_dir": True,
        **case.keys,
    }
