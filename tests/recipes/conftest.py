"""A tiny random checkpoint, a few rows, and a way to run the fine-tuning recipe on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mytune.assets import ASSETS
from mytune.cli.main import main
from tests.hf import tiny_llama

LORA = {
    "_component_": "mytune.models.lora_auto_model",
    "checkpoint_dir": "${checkpointer.checkpoint_dir}",
    "lora_attn_modules": ["q_proj", "v_proj", "o_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
FULL = {
    "_component_": "mytune.models.auto_model",
    "checkpoint_dir": "${checkpointer.checkpoint_dir}",
}
# What changes no result, and by how much it may.
LEVERS = {
    "activation checkpointing": ("enable_activation_checkpointing=True", 0),
    "offloading": ("enable_activation_offloading=True", 0),
    "compile": ("compile=True", 1e-5),
}


def recipe_of(config: dict[str, Any], ranks: str = "single_device") -> str:
    """Return the name under which a config's model is trained."""
    method = "lora" if "lora_" in config["model"]["_component_"] else "full"
    return f"{method}_finetune_{ranks}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: random Llama, the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tiny_llama(vocab_size=1024, num_hidden_layers=2).save_pretrained(folder)
    shutil.copy(ASSETS / "tiny" / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of unequal length; two of them train nothing."""
    folder = tmp_path_factory.mktemp("rows")
    words = "one two three four five six seven".split()
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(40):
            output = "" if i in (5, 6) else " ".join(words[: 1 + i % 7])
            file.write(json.dumps({"input": f"Repeat {i} times: {words[i % 7]}", "output": output}))
            file.write("\n")
    return folder / "rows.jsonl"


@pytest.fixture
def config(checkpoint: Path, rows: Path, tmp_path: Path) -> dict[str, Any]:
    """A full fine-tuning config; a test changes what it is about."""
    return {
        "output_dir": str(tmp_path / "run"),
        "model": FULL,
        "tokenizer": {
            "_component_": "mytune.models.llama3.llama3_tokenizer",
            "path": str(checkpoint / "tokenizer.model"),
            "max_seq_len": 64,
        },
        "checkpointer": {
            "_component_": "mytune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(checkpoint),
            "output_dir": "${output_dir}",
        },
        "dataset": {"_component_": "mytune.datasets.instruct_dataset", "source": str(rows)},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "seed": 7,
        "device": "cpu",
        "dtype": "fp32",
    }


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the recipe on a config and overrides; check the exit code, return the metrics by step."""

    def run_recipe(config: dict[str, Any], *overrides: str, code: int = 0) -> list[dict[str, Any]]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        command = ["run", recipe_of(config), "--config", str(file), *overrides]
        assert main(command) == code
        return metrics_of(config, overrides)

    return run_recipe


def metrics_of(config: dict[str, Any], overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return what a run has logged, by step; nothing if it has not begun to."""
    said = next((o.partition("=")[2] for o in overrides if o.startswith("output_dir=")), None)
    metrics = Path(said or config["output_dir"]) / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines]


def curve(metrics: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Return what two equal runs must share: loss, gradient norm and learning rate of each step."""
    return [(m["loss"], m["grad_norm"], m["lr"]) for m in metrics if "loss" in m]


def assert_same_curve(
    left: list[dict[str, Any]], right: list[dict[str, Any]], rel: float = 1e-6
) -> None:
    """Demand that the metrics of two runs are of equal curves, but for roundings."""
    for a, b in zip(curve(left), curve(right), strict=True):
        assert a == pytest.approx(b, rel=rel, abs=0)
