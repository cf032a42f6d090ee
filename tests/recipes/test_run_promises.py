"""What a run promises: exact resume, nothing lost, finite numbers, signals, one run a folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mytune import training
from mytune.datasets import BatchLoader
from mytune.training import checkpointing
from mytune.training.checkpointing import checkpointers
from tests.recipes.conftest import LORA, curve, recipe_of

MODELS = {"full": {}, "lora": {"model": {**LORA, "lora_dropout": 0.1}}}
SCHEDULE = {
    "_component_": "mytune.training.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 2,
}


def files_of(folder):
    """Return the tensors that two equal checkpoints share: weights, adapter, optimizer."""
    names = [p for p in Path(folder).rglob("*") if p.suffix == ".safetensors"]
    return {str(p.relative_to(folder)): load_file(p) for p in names}


def assert_same_files(left, right):
    left, right = files_of(left), files_of(right)
    assert left.keys() == right.keys() and left
    for name, tensors in left.items():
        assert tensors.keys() == right[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, right[name][key]), (name, key)


class Killed(BaseException):
    """Ends a run wherever it is raised, as a kill would: nothing handles it."""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_r1_killed_and_resumed_equals_never_stopped(run, config, model, at, monkeypatch):
    config |= {**MODELS[model], "lr_scheduler": SCHEDULE, "save_every_n_steps": 1, "epochs": 2}
    config["max_steps_per_epoch"] = 3
    straight = {**config, "output_dir": config["output_dir"] + "_straight"}
    expected = run(straight)

    step = torch.optim.AdamW.step
    calls = []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > at:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, "step", dying)
        run(config)
    resumed = run(config, "resume_from_checkpoint=True")
    assert curve(resumed) == curve(expected)
    assert [m["step"] for m in resumed] == [1, 2, 3, 4, 5, 6]
    assert_same_files(straight["output_dir"] + "/epoch_1", config["output_dir"] + "/epoch_1")


def test_r1_adapters_alone_are_enough_to_go_on(run, config):
    config |= {"model": LORA, "save_adapter_weights_only": True, "epochs": 2}
    straight = {**config, "output_dir": config["output_dir"] + "_straight"}
    expected = run(straight, "max_steps_per_epoch=2")
    run(config, "epochs=1", "max_steps_per_epoch=2")
    resumed = run(config, "resume_from_checkpoint=True", "max_steps_per_epoch=2")
    assert curve(resumed) == curve(expected)
    saved = {p.name for p in Path(config["output_dir"], "epoch_1").iterdir()}
    assert "adapter" in saved and not any(name.endswith(".safetensors") for name in saved)


def test_r10_what_fails_in_the_background_is_told_and_costs_only_its_checkpoint(
    run, config, monkeypatch, capsys
):
    config |= {"save_every_n_steps": 1, "max_steps_per_epoch": 4}
    config["enable_async_checkpointing"] = True
    straight = {**config, "output_dir": config["output_dir"] + "_straight"}
    expected = run(straight)
    write, written = checkpointers.write_pieces, []

    def failing(draft, stem, *arguments, **settings):
        written.append(stem)
        if len(written) > 3:  # the model of step 2, after the optimizer
            raise OSError(errno.ENOSPC, "No space left on device", stem)
        return write(draft, stem, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointers, "write_pieces", failing)
        run(config, code=5)
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in Path(config["output_dir"]).glob("*step_*")] == ["step_1"]
    assert curve(run(config, "resume_from_checkpoint=True")) == curve(expected)
    assert_same_files(straight["output_dir"] + "/epoch_0", config["output_dir"] + "/epoch_0")


def test_a_finished_run_can_be_extended(run, config):
    run(config, "max_steps_per_epoch=2")
    metrics = run(config, "resume_from_checkpoint=True", "epochs=3", "max_steps_per_epoch=2")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert len(run(config, "resume_from_checkpoint=True", "epochs=3", "max_steps_per_epoch=2")) == 6


def test_r3_a_corrupt_checkpoint_is_skipped_with_a_warning(run, config, capsys):
    config |= {"save_every_n_steps": 1, "max_steps_per_epoch": 3}
    expected = curve(run(config))
    weights = Path(config["output_dir"], "epoch_0", "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert curve(run(config, "resume_from_checkpoint=True")) == expected
    assert "epoch_0" in capsys.readouterr().err


def test_other_data_is_not_resumed(run, config, capsys):
    run(config, "max_steps_per_epoch=1")
    run(config, "resume_from_checkpoint=True", "batch_size=2", "max_steps_per_epoch=1", code=2)
    assert "rows_per_step: was 8, is 4" in capsys.readouterr().err
    other = ("shuffle=False", "seed=8", "max_steps_per_epoch=1")
    run(config, "resume_from_checkpoint=True", *other, code=2)
    told = capsys.readouterr().err
    assert "shuffle: was True, is False" in told
    run(config, "resume_from_checkpoint=True", "dtype=bf16", code=2)
    assert "dtype: was float32, is bfloat16" in capsys.readouterr().err
    assert "seed: a run that goes on keeps its own, 7" in told


def test_r5_saving_changes_nothing(run, config):
    config |= {"model": LORA, "max_steps_per_epoch": 4}
    plain = run(config)
    often = {**config, "output_dir": config["output_dir"] + "_often", "save_every_n_steps": 1}
    assert curve(run(often)) == curve(plain)
    assert_same_files(config["output_dir"] + "/epoch_0", often["output_dir"] + "/epoch_0")


def test_r6_numbers_that_are_not_finite_stop_the_run(run, config, capsys, monkeypatch):
    config |= {"save_every_n_steps": 1}
    step = torch.optim.AdamW.step

    def poison(self, *args, **kwargs):
        step(self, *args, **kwargs)
        parameter = self.param_groups[0]["params"][0]
        if self.state[parameter]["step"] == 2:
            parameter.data[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", poison)
    run(config, code=6)
    assert [p.name for p in Path(config["output_dir"]).glob("step_*")] == ["step_1"]


def test_a_checkpoint_in_the_background_is_finished_before_an_error_frees_the_folder(
    run, config, monkeypatch
):
    config |= {"save_every_n_steps": 1, "enable_async_checkpointing": True}
    write = checkpointers.write_pieces

    def slowly(*arguments, **settings):
        time.sleep(1)
        return write(*arguments, **settings)

    monkeypatch.setattr(checkpointers, "write_pieces", slowly)
    run(config, "optimizer.lr=1e30", "shuffle=False", code=6)
    assert [path.name for path in Path(config["output_dir"]).glob("*step_*")] == ["step_1"]


SAVED = {"bf16": {"dtype": "bf16"}, "fp32": {}, "LoRA": {"dtype": "bf16", "model": LORA}}


@pytest.mark.parametrize("setting", SAVED)
def test_the_disk_must_have_room_for_what_is_saved(run, config, monkeypatch, setting):
    asked = []
    monkeypatch.setattr(
        training, "check_disk_space", lambda _, size: asked.append(size), raising=False
    )
    run(config | SAVED[setting], "max_steps_per_epoch=1")
    files = Path(config["output_dir"], "epoch_0").rglob("*.safetensors")
    assert asked == [pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)]


def test_a_loss_that_is_not_finite_stops_before_the_step(run, config, capsys):
    run(config, "optimizer.lr=1e30", "shuffle=False", code=6)
    assert "step 2" in capsys.readouterr().err


def test_r8_another_runs_results_are_not_overwritten(run, config, capsys):
    first = run(config, "max_steps_per_epoch=1")
    assert run(config, "max_steps_per_epoch=1", "seed=8", code=7) == first
    assert "overwrite_output_dir=True" in capsys.readouterr().err
    assert run(config, "max_steps_per_epoch=1", "seed=8", "overwrite_output_dir=True") != first


def start(config, tmp_path, *overrides):
    """Start the recipe in a process of its own; return it once it has made a step."""
    file = tmp_path / "process.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mytune", "run", recipe_of(config)]
    process = subprocess.Popen(
        [*command, "--config", str(file), *overrides], stderr=subprocess.PIPE, text=True
    )
    metrics = Path(config["output_dir"], "metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_r7_a_signal_ends_the_step_saves_and_can_be_resumed(run, config, tmp_path, number):
    config |= {"epochs": 40}
    process = start(config, tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    message = process.stderr.read()
    assert "resume_from_checkpoint=True" in message and "Traceback" not in message
    done = json.loads(Path(config["output_dir"], "metrics.jsonl").read_text().splitlines()[-1])
    epochs = done["step"] // 5 + 1
    resumed = run(config, "resume_from_checkpoint=True", f"epochs={epochs}")
    straight = {**config, "output_dir": config["output_dir"] + "_straight"}
    assert curve(resumed) == curve(run(straight, f"epochs={epochs}"))


def validations(metrics):
    return [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]


def test_r7_a_signal_ends_a_validation(run, config, monkeypatch):
    config |= {"dataset_val": config["dataset"], "run_val_every_n_steps": 2, "epochs": 1}
    expected = run({**config, "output_dir": config["output_dir"] + "_straight"})
    steps, seen = BatchLoader.steps, []

    def signal_in_validation(self, epoch, start=0):
        for step in steps(self, epoch, start):
            if not self.shuffle:
                seen.append(step)
                signal.raise_signal(signal.SIGTERM)
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "steps", signal_in_validation)
        stopped = run(config, code=75)
    assert len(seen) == 1
    assert [m["step"] for m in stopped] == [1, 2] and "val_loss" not in stopped[-1]
    resumed = run(config, "resume_from_checkpoint=True")
    assert curve(resumed) == curve(expected)
    assert validations(resumed) == validations(expected) and len(validations(expected)) >= 2


def test_r2_a_kill_never_costs_the_last_good_checkpoint(run, config, tmp_path):
    config |= {"epochs": 40, "save_every_n_steps": 1}
    process = start(config, tmp_path)
    time.sleep(0.3)
    process.kill()
    process.wait()
    left = checkpointing.latest(Path(config["output_dir"]))
    assert left is not None
    assert not list(Path(config["output_dir"]).glob("*.tmp-*")) or left.step
    run(config, "resume_from_checkpoint=True", f"epochs={left.step // 5 + 1}")
    assert not list(Path(config["output_dir"]).glob("*.tmp-*"))


def test_r8_a_second_run_in_the_same_folder_ends_at_once(run, config, tmp_path, capsys):
    process = start({**config, "epochs": 400}, tmp_path)
    try:
        began = time.monotonic()
        run(config, "overwrite_output_dir=True", code=7)
        assert time.monotonic() - began < 10
        assert str(process.pid) in capsys.readouterr().err
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert os.path.exists(config["output_dir"])


def test_overwriting_removes_nothing_before_the_new_run_can_start(run, config, capsys):
    first = run(config, "max_steps_per_epoch=1")
    kept = files_of(config["output_dir"])
    run(config, "overwrite_output_dir=True", "model.checkpoint_dir=/nowhere", code=2)
    assert run(config, "overwrite_output_dir=True", "tokenizer.max_seq_len=1", code=3) == first
    assert files_of(config["output_dir"]).keys() == kept.keys()


def test_a_setting_that_changed_since_the_checkpoint_wins_and_is_told(run, config, capsys):
    run(config, "max_steps_per_epoch=2")
    metrics = run(
        config,
        "resume_from_checkpoint=True",
        "epochs=2",
        "max_steps_per_epoch=2",
        "optimizer.lr=1e-5",
    )
    assert [m["lr"] for m in metrics] == [1e-3, 1e-3, 1e-5, 1e-5]
    assert "optimizer.lr was 0.001 in the checkpoint and is 1e-05 now" in capsys.readouterr().err


def test_a_wrong_value_for_another_library_is_the_configs_fault(run, config, capsys):
    run(config, "optimizer.lr=-1", code=2)
    assert "Invalid learning rate" in capsys.readouterr().err


def test_an_optimizer_that_needs_a_closure_is_refused(run, config, capsys):
    config |= {"optimizer": {"_component_": "torch.optim.LBFGS"}}
    run(config, code=2)
    assert "asks for a closure" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "RMSprop", "NAdam"])
def test_other_optimizers_train_and_resume(run, config, name):
    config |= {"optimizer": {"_component_": f"torch.optim.{name}", "lr": 1e-3}}
    config |= {"max_steps_per_epoch": 2}
    straight = run({**config, "output_dir": config["output_dir"] + "_straight"}, "epochs=2")
    run(config)
    assert curve(run(config, "resume_from_checkpoint=True", "epochs=2")) == curve(straight)


def test_the_same_folder_named_in_two_ways_is_one(run, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = f"checkpointer.output_dir={tmp_path}/run"
    assert run(config, "output_dir=run", folder, "max_steps_per_epoch=1")


def test_a_folder_of_metrics_belongs_to_one_run(run, config, tmp_path, capsys):
    logs = {"_component_": "mytune.training.DiskLogger", "log_dir": str(tmp_path / "logs")}
    run({**config, "metric_logger": logs})
    before = (tmp_path / "logs" / "metrics.jsonl").read_bytes()
    other = {**config, "metric_logger": logs, "output_dir": str(tmp_path / "other")}
    run(other, code=7)
    assert f"metric_logger.log_dir: {tmp_path}" in capsys.readouterr().err
    assert (tmp_path / "logs" / "metrics.jsonl").read_bytes() == before


OWN = """
import torch
from torch.optim import lr_scheduler as torchs


def sequential(optimizer, num_training_steps):
    rise = torchs.LinearLR(optimizer, 0.1, total_iters=2)
    fall = torchs.CosineAnnealingLR(optimizer, num_training_steps - 2)
    return torchs.SequentialLR(optimizer, [rise, fall], [2])


def one_cycle(optimizer, num_training_steps):
    return torchs.OneCycleLR(optimizer, 1e-3, num_training_steps)


def stairs(optimizer, num_training_steps):
    return torchs.MultiStepLR(optimizer, [1, 3])


class Growing(torch.optim.SGD):
    # Keeps what it has learned in its groups, as Prodigy does.
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.defaults["d"] = 0.5
        for group in self.param_groups:
            group["d"] = 0.5

    def step(self, closure=None):
        for group in self.param_groups:
            group["d"] *= 1.5
            with torch.no_grad():
                for p in group["params"]:
                    p -= group["lr"] * group["d"] * p.grad
"""


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lr_scheduler", "sequential"),
        ("lr_scheduler", "one_cycle"),
        ("lr_scheduler", "stairs"),
        ("optimizer", "Growing"),
    ],
)
def test_r1_schedules_and_optimizers_of_ones_own_resume_exactly(
    run, config, key, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"own_{name}.py").write_text(OWN)
    more = {"lr": 1e-3} if key == "optimizer" else {}
    config |= {key: {"_component_": f"own_{name}.{name}", **more}}
    config |= {"max_steps_per_epoch": 2, "epochs": 2}
    straight = run({**config, "output_dir": config["output_dir"] + "_straight"})
    run(config)
    shutil.rmtree(Path(config["output_dir"]) / "epoch_1")
    assert curve(run(config, "resume_from_checkpoint=True")) == curve(straight)
    assert len({m["lr"] for m in straight}) > 1 or key == "optimizer"
    assert "in the checkpoint" not in capsys.readouterr().err


def test_what_a_checkpoint_does_not_tell_of_ones_own_model_and_format_is_said(
    run, config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_model.py").write_text(
        "from mytune.models import auto_model\n"
        "from mytune.modules import Decoder\n\n\n"
        "class Own(Decoder):\n    pass\n\n\n"
        "def own(checkpoint_dir: str):\n    return Own(auto_model(checkpoint_dir).config)\n"
    )
    folder = config["checkpointer"]["checkpoint_dir"]
    run(config, "max_steps_per_epoch=1")
    assert "warning" not in capsys.readouterr().err
    config |= {"model": {"_component_": "own_model.own", "checkpoint_dir": folder}}
    config["tokenizer"]["prompt_template"] = {"user": ["Q: ", ""]}
    run(config, "max_steps_per_epoch=1", "overwrite_output_dir=true")
    told = capsys.readouterr().err
    assert "Own is one of your own, and config.json in its checkpoints is of the base's" in told
    assert "the tokenizer has no chat_template: checkpoints keep that of their base" in told


def test_r2_the_checkpoint_with_the_lowest_val_loss_stays(run, config, tmp_path):
    config |= {
        "dataset_val": config["dataset"],
        "run_val_every_n_steps": 1,
        "save_every_n_steps": 1,
    }
    config |= {"max_steps_per_epoch": 5}
    config["checkpointer"]["keep_last_n_checkpoints"] = 1
    metrics = run(config, "optimizer.lr=0.3")  # too large: it falls, and then rises
    losses = {m["step"]: m["val_loss"] for m in metrics if "val_loss" in m}
    best = min(range(1, 5), key=losses.__getitem__)
    assert best < 4
    left = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert left == {"epoch_0", f"step_{best}"}
