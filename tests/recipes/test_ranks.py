"""Two ranks train as one does: same losses, gradient norms and weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.recipes.conftest import LORA, curve

pytestmark = pytest.mark.ranks


def torchrun(config, tmp_path, *overrides, code=0):
    """Run the distributed recipe on two processes; return the metrics by step."""
    file = tmp_path / "ranks.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mytune", "run", "--nproc_per_node", "2"]
    command += ["full_finetune_distributed", "--config", str(file), *overrides]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    metrics = Path(config["output_dir"]) / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize("model", ["full", "lora"])
def test_two_ranks_equal_one(run, config, tmp_path, model):
    """Twenty steps over rows of unequal length."""
    config |= {"epochs": 4, "clip_grad_norm": 1.0}
    config |= {"model": LORA} if model == "lora" else {}
    alone = run({**config, "output_dir": config["output_dir"] + "_alone"})
    both = torchrun(config, tmp_path, "gradient_accumulation_steps=1")
    for a, b in zip(curve(alone), curve(both), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    left = load_file(config["output_dir"] + "_alone/epoch_3/model.safetensors")
    right = load_file(config["output_dir"] + "/epoch_3/model.safetensors")
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-4)


def test_a_run_of_two_ranks_resumes_on_one(run, config, tmp_path):
    config |= {"max_steps_per_epoch": 3}
    expected = run({**config, "output_dir": config["output_dir"] + "_alone"}, "epochs=2")
    torchrun(config, tmp_path, "gradient_accumulation_steps=1")
    resumed = run(config, "resume_from_checkpoint=True", "epochs=2")
    for a, b in zip(curve(resumed), curve(expected), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
