"""Every config fits its recipe, and every recipe runs on the embedded model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mytune.cli import registry
from mytune.cli.main import main
from mytune.config import check_components, instantiate, load_config
from mytune.training import count_parameters

NAMES = registry.configs()
FINETUNE = [n for n in NAMES if registry.recipe_of(n).file_name == "finetune.py"]


def load(name):
    return load_config(registry.recipe_of(name).file, registry.config_path(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_fits_its_recipe(name):
    problems = check_components(load(name), files=False)
    # bitsandbytes is an extra: only its absence may be a problem here.
    assert [p for p in problems if "bitsandbytes" not in p] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_short_and_says_how_to_run_it(name):
    lines = registry.config_path(name).read_text().splitlines()
    assert len(lines) <= 30
    assert any(f"--config {name}" in line for line in lines[:6])


SIZES = {"1B": 1.24e9, "3B": 3.21e9, "8B": 8.03e9, "70B": 70.6e9}


@pytest.mark.parametrize("name", [n for n in FINETUNE if not n.startswith("tiny/")])
def test_every_config_builds_its_model(name):
    with torch.device("meta"):
        model = instantiate(load(name).values()["model"])
    size = SIZES[name.split("/")[1].split("_")[0]]
    total, trained = count_parameters(model)
    assert math.isclose(total, size, rel_tol=0.06)
    assert (trained == total) == ("full" in name)


TINY = {
    "tiny/lora_single_device": "lora_finetune_single_device",
    "tiny/full_single_device": "full_finetune_single_device",
}


@pytest.mark.parametrize(("config", "recipe"), TINY.items(), ids=TINY.keys())
def test_every_recipe_makes_two_steps(config, recipe, tmp_path):
    command = ["run", recipe, "--config", config, f"output_dir={tmp_path}"]
    assert main([*command, "max_steps_per_epoch=2", "epochs=1", "batch_size=4"]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 2]
    assert {"loss", "lr", "grad_norm", "tokens_per_second_per_gpu"} <= metrics[0].keys()
    assert "val_loss" in metrics[-1]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["final_loss"] == metrics[1]["loss"]
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.glob("epoch_*")} == {"epoch_0"}
    assert "${asset:tiny}" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("recipe", "builder", "repair"),
    [
        ("lora_finetune_single_device", "auto_model", "mytune.models.lora_auto_model"),
        ("full_finetune_single_device", "qlora_auto_model", "mytune.models.auto_model"),
    ],
)
def test_a_model_that_trains_something_else_is_refused(recipe, builder, repair, tmp_path, capsys):
    config = "tiny/lora_single_device" if "lora" in recipe else "tiny/full_single_device"
    command = ["run", recipe, "--config", config, f"output_dir={tmp_path / 'run'}"]
    assert main([*command, f"model=torchtune.models.{builder}", "model.checkpoint_dir=."]) == 2
    assert f"{builder} does not: model._component_={repair}, or `tune" in capsys.readouterr().err
    model = [f"model=mytune.models.{builder}", "model.checkpoint_dir=."]
    assert main(["validate", config, "--recipe", recipe, *model]) == 2
    assert f"{builder} does not" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["lora_finetune_distributed", "full_finetune_distributed"])
def test_a_distributed_name_is_the_same_recipe(name):
    assert registry.RECIPES[name].file == registry.ROOT / "recipes" / "finetune.py"


def test_a_copied_recipe_and_config_run_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["cp", "lora_finetune_single_device", "mine.py"]) == 0
    assert main(["cp", "tiny/lora_single_device", "mine.yaml"]) == 0
    run = ["run", "mine.py", "--config", "mine.yaml", "max_steps_per_epoch=1", "epochs=1"]
    assert main([*run, "batch_size=2", "dataset_val=null"]) == 0
    assert Path("outputs/tiny/lora/epoch_0/adapter/adapter_config.json").is_file()
