"""Optimizer steps over the same random Llama, the same rows and the same settings by mytune's
recipe, by torchtune's and by a plain transformers (and peft) loop: batch 4, AdamW, no activation
checkpointing, no compile. `wide` is 70 M parameters with Llama 3's vocabulary of 128,256, `deep`
34 M with 8 blocks and a vocabulary of 8,192. `torchtune` is its recipe as it is configured for
Llama 3, `torchtune, whole logits` the same with `torch.nn.CrossEntropyLoss`. The losses of all must
agree, step by step. All run at once and take turns, one step each; times are CPU seconds where
there is one thread. Tokens exclude padding. Memory is the most that the whole process held.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.common import (
    NO_TORCHTUNE,
    TORCHTUNE_PYTHON,
    Row,
    median_ratio,
    take_turns,
)
from tests.benchmarks.model import DTYPES, SHAPES, Shape, write_model, write_rows
from tests.benchmarks.peers.turns import read_rows

TITLE = "Training"
BATCH_SIZE = 4
WARM_UP = 1
# Relative, step by step. Adapters start from other random numbers in each library.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-3}
LORA = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 8,
    "lora_alpha": 16,
}
PEFT_LORA = {
    "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "r": 8,
    "lora_alpha": 16,
}
OPTIMIZER = {"lr": 1e-5, "weight_decay": 0.01, "fused": True}
# Constant: the recipe for LoRA demands a schedule.
SCHEDULE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 0,
    "num_cycles": 1e-9,
}
WHOLE_LOGITS = "torch.nn.CrossEntropyLoss"
CHUNKED = "torchtune.modules.loss.CEWithChunkedOutputLoss"


def measure(quick: bool) -> list[Row]:
    """Return a row per shape, method, dtype and peer."""
    if not TORCHTUNE_PYTHON:
        print(NO_TORCHTUNE)
    turns = 3 if quick else 7
    shapes = ["wide"] if quick else list(SHAPES)
    found: list[Row] = []
    for shape, method, dtype in product(shapes, ("LoRA", "full"), DTYPES):
        with tempfile.TemporaryDirectory() as folder:
            found += measure_case(Path(folder), shape, method, dtype, turns)
    return found


def measure_case(folder: Path, shape: str, method: str, dtype: str, turns: int) -> Iterator[Row]:
    """Compare all peers in one case."""
    write_model(folder / "model", SHAPES[shape])
    rows = folder / "rows.jsonl"
    write_rows(rows, BATCH_SIZE * (turns + WARM_UP + 2), SHAPES[shape].vocab_size)
    lengths = [len(tokens) for tokens, _ in read_rows(str(rows))]
    answers = take_turns(commands(folder, SHAPES[shape], method, dtype), folder, turns, WARM_UP)
    differences = loss_differences(answers)
    assert max(differences.values()) <= TOLERANCE[dtype], differences  # else times mean nothing
    steps = [sum(lengths[i : i + BATCH_SIZE]) for i in range(0, len(lengths), BATCH_SIZE)]
    tokens = steps[1 + WARM_UP : 1 + WARM_UP + turns]
    seconds = {name: [turn["seconds"] for turn in said[1:]] for name, said in answers.items()}
    for name, said in answers.items():
        yield {
            "model": shape,
            "method": method,
            "dtype": dtype,
            "library": name,
            "tokens/s": statistics.median(
                n / s for n, s in zip(tokens, seconds[name], strict=True)
            ),
            "mytune is x times as fast": median_ratio(seconds["mytune"], seconds[name]),
            "peak MB": said[-1]["peak"] / 1e6,
            "losses differ by": differences[name],
        }


def loss_differences(answers: dict[str, list[Row]]) -> dict[str, float]:
    """Return how far each peer's losses are from mytune's, relative, at the worst step."""
    expected = [turn["loss"] for turn in answers["mytune"]]
    return {
        name: max(abs(turn["loss"] - b) / b for turn, b in zip(said, expected, strict=True))
        for name, said in answers.items()
    }


def commands(folder: Path, shape: Shape, method: str, dtype: str) -> dict[str, Sequence[str]]:
    """Return the command of every peer that is there."""
    config = recipe_config(folder, shape, method == "LoRA", dtype)
    ours = as_mytune(config)
    found = {"mytune": [sys.executable, "-m", "mytune", *run(folder / "mytune.yaml", ours, method)]}
    if TORCHTUNE_PYTHON:
        tune = [TORCHTUNE_PYTHON, "-m", "torchtune._cli.tune"]
        for name, loss in (("torchtune", CHUNKED), ("torchtune, whole logits", WHOLE_LOGITS)):
            theirs = {**config, "loss": {"_component_": loss}}
            found[name] = [*tune, *run(folder / f"{name}.yaml", theirs, method)]
    settings = {
        "model": str(folder / "model"),
        "rows": str(folder / "rows.jsonl"),
        "dtype": DTYPES[dtype],
        "lora": PEFT_LORA if method == "LoRA" else None,
        "optimizer": OPTIMIZER,
        "batch_size": BATCH_SIZE,
    }
    plain = [sys.executable, "-m", "tests.benchmarks.peers.transformers_train"]
    return {**found, "transformers": [*plain, json.dumps(settings)]}


def run(file: Path, config: dict[str, Any], method: str) -> list[str]:
    """Write a config and return the arguments of `tune` that run it."""
    file.write_text(yaml.safe_dump(config))
    return ["run", f"{method.lower()}_finetune_single_device", "--config", str(file)]


def recipe_config(folder: Path, shape: Shape, lora: bool, dtype: str) -> dict[str, Any]:
    """Return a config of torchtune's recipes."""
    builder = "lora_llama3" if lora else "llama3"
    return {
        "output_dir": str(folder / "torchtune"),
        "model": {
            "_component_": f"torchtune.models.llama3.{builder}",
            **shape.arguments(),
            **(LORA if lora else {}),
        },
        "tokenizer": {"_component_": "tests.benchmarks.peers.turns.Ids"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(folder / "model"),
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": "${output_dir}",
            "model_type": "LLAMA3",
        },
        "resume_from_checkpoint": False,
        "dataset": {
            "_component_": "tests.benchmarks.peers.turns.Rows",
            "path": str(folder / "rows.jsonl"),
        },
        "seed": 0,
        "shuffle": False,
        "batch_size": BATCH_SIZE,
        "optimizer": {"_component_": "torch.optim.AdamW", **OPTIMIZER},
        **({"lr_scheduler": SCHEDULE} if lora else {"optimizer_in_bwd": False}),
        "epochs": 1,
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "metric_logger": {"_component_": "tests.benchmarks.peers.turns.TurnLogger"},
        "device": "cpu",
        "dtype": dtype,
        "enable_activation_checkpointing": False,
    }


def as_mytune(config: dict[str, Any]) -> dict[str, Any]:
    """Return mytune's config: torchtune's, component names and all, but for the rows."""
    rows = {**config["dataset"], "_component_": "tests.benchmarks.peers.mytune_rows.rows"}
    ours = {**config, "output_dir": config["output_dir"] + "_mytune", "dataset": rows}
    ours.pop("optimizer_in_bwd", None)
    return ours
