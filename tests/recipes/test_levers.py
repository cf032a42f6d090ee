"""Levers that save memory change nothing, survive a resume, and say where they cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.recipes.conftest import FULL, LORA, curve
from tests.recipes.test_run_promises import SCHEDULE, Killed, assert_same_files

ONE = "gradient_accumulation_steps=1"
LEVERS = {
    "every block": (LORA, ["ac_mode=full"]),
    "every second block": (LORA, ["ac_mode=selective", "ac_option=2"]),
    "all but products": (LORA, ["ac_mode=selective", "ac_option=op"]),
    "offloading without streams": (
        LORA,
        ["enable_activation_offloading=True", "activation_offloading_use_streams=False"],
    ),
    "optimizer in backward, adapters": (LORA, ["optimizer_in_bwd=True"]),
    "optimizer in backward": (FULL, ["optimizer_in_bwd=True"]),
    "all together": (
        FULL,
        ["ac_mode=auto", "enable_activation_offloading=True", "optimizer_in_bwd=True"],
    ),
}


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles its optimizers' step, which takes minutes here and changes no idea."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_nothing(run, config, lever):
    model, overrides = LEVERS[lever]
    dropout = {"lora_dropout": 0.1} if model is LORA else {}
    config |= {"model": {**model, **dropout}, "max_steps_per_epoch": 2}
    config |= {"gradient_accumulation_steps": 1}
    plain, folder = run(config), config["output_dir"] + "_lever"
    assert curve(run(config, f"output_dir={folder}", *overrides)) == curve(plain)
    assert_same_files(config["output_dir"] + "/epoch_0", folder + "/epoch_0")


@pytest.mark.parametrize("at", [1, 40, 47])
def test_r1_a_run_that_steps_in_backward_is_killed_and_resumed(run, config, at, monkeypatch):
    """It dies in the midst of a step: each takes 21 parameters, one by one."""
    config |= {"optimizer_in_bwd": True, "gradient_accumulation_steps": 1, "epochs": 2}
    config |= {"lr_scheduler": SCHEDULE, "save_every_n_steps": 1, "max_steps_per_epoch": 2}
    straight = {**config, "output_dir": config["output_dir"] + "_straight"}
    expected = run(straight)
    step, calls = torch.optim.AdamW.step, []

    def dying(self, *args, **kwargs):
        if self.param_groups[0]["params"][0].shape[0] > 64 or len(calls):  # not the trial's
            calls.append(1)
        if len(calls) > at:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, "step", dying)
        run(config)
    assert curve(run(config, "resume_from_checkpoint=True")) == curve(expected)
    assert_same_files(straight["output_dir"] + "/epoch_1", config["output_dir"] + "/epoch_1")


def test_r6_stepping_in_backward_saves_nothing_that_is_not_finite(run, config, capsys):
    config |= {"optimizer_in_bwd": True, "gradient_accumulation_steps": 1, "shuffle": False}
    run(config, "optimizer.lr=1e30", "save_every_n_steps=1", code=6)
    said = capsys.readouterr().err
    assert "step 2: loss is" in said
    assert "(rows [4, 5, 6, 7] of the data)" in said
    assert [p.name for p in Path(config["output_dir"]).glob("step_*")] == ["step_1"]


def test_what_excludes_stepping_in_backward_is_said_before_loading(run, config, capsys):
    run(config, "optimizer_in_bwd=True", "clip_grad_norm=1.0", code=2)
    said = capsys.readouterr().err
    assert "gradient_accumulation_steps is 2" in said and "clip_grad_norm is 1.0" in said
    assert "model:" not in said


def test_replicated_ranks_cannot_step_in_backward(run, config, capsys, monkeypatch):
    monkeypatch.setattr("mytune.training.optimizers.world_size", lambda: 2)
    run(config, "optimizer_in_bwd=True", ONE, code=2)
    assert "2 ranks hold the same weights" in capsys.readouterr().err


OPTIMIZERS = {
    "bitsandbytes.optim.AdamW8bit": {"in_backward": True},
    "bitsandbytes.optim.PagedAdamW8bit": {},
    "bitsandbytes.optim.PagedAdamW": {},
    "torchao.optim.AdamW8bit": {},
    "torchao.optim.AdamW4bit": {"bf16_stochastic_round": True},
    "torchao.optim.AdamWFp8": {},
    "torchao.optim._AdamW": {"bf16_stochastic_round": True, "in_backward": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_small_optimizers_train_and_resume_exactly(run, config, name):
    pytest.importorskip(name.partition(".")[0])
    settings = dict(OPTIMIZERS[name])
    config |= {"optimizer_in_bwd": settings.pop("in_backward", False)}
    config |= {"optimizer": {"_component_": name, "lr": 1e-3, **settings}, "dtype": "bf16"}
    config |= {"max_steps_per_epoch": 2, "lr_scheduler": SCHEDULE, "epochs": 2}
    config |= {"gradient_accumulation_steps": 1}
    straight = {**config, "output_dir": config["output_dir"] + "_straight"}
    expected = run(straight)
    assert expected[-1]["loss"] < expected[0]["loss"]
    run(config, "epochs=1")
    assert curve(run(config, "resume_from_checkpoint=True"))[2:] == curve(expected)[2:]
    assert_same_files(straight["output_dir"] + "/epoch_1", config["output_dir"] + "/epoch_1")
