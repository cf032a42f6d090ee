"""The recipe on a GPU: as on a CPU, exact where it resumes or recomputes, saved for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mytune.models import auto_model
from mytune.training import FullModelHFCheckpointer, load_weights
from tests.gpu import DEVICE
from tests.recipes.conftest import (  # noqa: F401  # fixtures
    LORA,
    Run,
    checkpoint,
    config,
    curve,
    rows,
    run,
)

QLORA = {**LORA, "_component_": "mytune.models.qlora_auto_model"}
ON_GPU = (f"device={DEVICE.type}", "cudnn_deterministic_mode=error", "overwrite_output_dir=True")


@pytest.mark.parametrize("model", [None, LORA, QLORA], ids=["full", "LoRA", "QLoRA"])
def test_it_trains_as_on_a_cpu(run: Run, config: dict[str, Any], model: Any) -> None:  # noqa: F811
    config = {**config, "model": model or config["model"]}
    expected = curve(run(config, "max_steps_per_epoch=3"))
    found = curve(run(config, *ON_GPU, "max_steps_per_epoch=3"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_resumed_run_is_one_never_stopped(run: Run, config: dict[str, Any]) -> None:  # noqa: F811
    whole = curve(run(config, *ON_GPU, "epochs=2", "dtype=bf16"))
    keys = (*ON_GPU[:2], "epochs=2", "dtype=bf16", f"output_dir={config['output_dir']}_resumed")
    run(config, *keys, "epochs=1")
    assert curve(run(config, *keys, "resume_from_checkpoint=True")) == whole


LEVERS = {
    "recompute": ("enable_activation_checkpointing=True", 0),
    "offloading": ("enable_activation_offloading=True", 0),
    "fused": ("optimizer.fused=True", 1e-5),
}


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_nothing(run: Run, config: dict[str, Any], lever: str) -> None:  # noqa: F811
    override, tolerance = LEVERS[lever]
    config = {**config, "model": {**LORA, "lora_dropout": 0.1}, "dtype": "fp32"}
    plain = curve(run(config, *ON_GPU, "max_steps_per_epoch=3"))
    other = curve(run(config, *ON_GPU, "max_steps_per_epoch=3", override))
    for ours, theirs in zip(other, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=0)


def test_packed_rows_train_as_unpacked_ones(run: Run, config: dict[str, Any]) -> None:  # noqa: F811
    """Packs of 128, the shortest that FlexAttention serves."""
    keys = (*ON_GPU, "batch_size=40", "gradient_accumulation_steps=1", "epochs=3")
    config["tokenizer"]["max_seq_len"] = 128
    plain = curve(run(config, *keys))
    packed = curve(run(config, *keys, "dataset.packed=True"))
    for ours, theirs in zip(packed, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_what_it_saves_loads_in_transformers_and_on_the_gpu(
    run: Run,  # noqa: F811
    config: dict[str, Any],  # noqa: F811
) -> None:
    run(config, *ON_GPU, "max_steps_per_epoch=2")
    folder = str(Path(config["output_dir"]) / "epoch_0")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    with torch.device("meta"):
        ours = auto_model(folder)
    weights = FullModelHFCheckpointer(folder).weights(ours.config)
    load_weights(ours, weights, DEVICE, torch.float32)
    tokens = torch.arange(3, 60, device=DEVICE)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
