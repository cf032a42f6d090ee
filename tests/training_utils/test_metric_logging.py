"""Metric loggers: the file and its resume, TensorBoard for real, trackers through stand-ins."""

from __future__ import annotations

import json
import math
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from mytune.errors import ResourceError
from mytune.training import metric_logging
from mytune.training.disk import write_atomic
from mytune.training.metric_logging import (
    CometLogger,
    DiskLogger,
    MetricLoggers,
    MLFlowLogger,
    StdoutLogger,
    TensorBoardLogger,
    WandBLogger,
    read_metrics,
)

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
CONFIG = f"seed: 1\nnote: {SECRET}\n"


def run(logger, first: int, last: int) -> None:
    logger.resume_at(first - 1)
    for step in range(first, last + 1):
        logger.log_dict({"loss": torch.tensor(1 / 3) / step, "lr": 1e-4 * step}, step)
        if step % 2 == 0:
            logger.log("val_loss", 2.0 / step, step)


def test_one_json_object_per_step(tmp_path):
    run(DiskLogger(str(tmp_path / "new" / "folder")), 1, 2)
    loss = torch.tensor(1 / 3).item()
    assert read_metrics(tmp_path / "new" / "folder" / "metrics.jsonl") == [
        {"step": 1, "loss": loss, "lr": 1e-4},
        {"step": 2, "loss": (torch.tensor(1 / 3) / 2).item(), "lr": 2e-4},
        {"step": 2, "val_loss": 1.0},
    ]


@pytest.mark.parametrize("stopped_at", range(1, 7))
def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path, stopped_at):
    run(DiskLogger(str(tmp_path / "whole")), 1, 6)
    logger = DiskLogger(str(tmp_path / "resumed"))
    run(logger, 1, 6)
    with logger.path.open("ab") as file:
        file.write(b'{"step": 7, "lo')  # killed in the middle of a line
    run(DiskLogger(str(tmp_path / "resumed")), stopped_at + 1, 6)
    assert logger.path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [p.name for p in logger.path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_kill_during_the_rewrite_leaves_the_old_log(tmp_path, monkeypatch):
    logger = DiskLogger(str(tmp_path))
    run(logger, 1, 3)
    before = logger.path.read_bytes()
    monkeypatch.setattr("os.fsync", MagicMock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        logger.resume_at(1)
    assert logger.path.read_bytes() == before


def test_nan_and_infinity_stay_json(tmp_path):
    logger = DiskLogger(str(tmp_path))
    logger.log_dict({"a": math.nan, "b": -math.inf, "c": 1.0}, 1)
    text = logger.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": 1.0,
    }


def test_a_link_is_not_followed(tmp_path):
    logger = DiskLogger(str(tmp_path / "run"))
    logger.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError, match=r"metrics.jsonl: Too many levels of symbolic links"):
        logger.log("loss", 1.0, 1)
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_a_resource_error_that_names_the_file(tmp_path, monkeypatch):
    logger = DiskLogger(str(tmp_path))
    monkeypatch.setattr(metric_logging, "_no_link", lambda _, flags: os.open("/dev/full", flags))
    with pytest.raises(ResourceError, match=r"metrics.jsonl: No space left") as error:
        logger.log("loss", 1.0, 1)
    assert error.value.exit_code == 5
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        DiskLogger(str(tmp_path / "file" / "below"))


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, b"old")
    monkeypatch.setattr("os.fsync", MagicMock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(ResourceError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger = MetricLoggers([DiskLogger(str(tmp_path / "log")), StdoutLogger(), WandBLogger()])
    run(logger, 1, 3)
    logger.log_config(CONFIG)
    logger.close()
    assert not (tmp_path / "log").exists() and capsys.readouterr().out == ""
    wandb.init.assert_not_called()


def test_several_loggers_get_the_same(tmp_path, capsys):
    run(MetricLoggers([DiskLogger(str(tmp_path)), StdoutLogger()]), 1, 1)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["lr"] == 1e-4
    assert capsys.readouterr().out == "step 1 | loss:0.333333 lr:0.0001\n"


def test_the_saved_config_holds_no_secret(tmp_path):
    DiskLogger(str(tmp_path)).log_config(CONFIG)
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("seed: 1\nnote: ") and SECRET not in text


def test_tensorboard_reads_the_curve_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 5), (4, 6)):
        logger = TensorBoardLogger(str(tmp_path))
        run(logger, first, last)
        logger.log_config(CONFIG)
        logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    lr = [(e.step, round(e.value, 8)) for e in events.Scalars("lr")]
    assert lr == [(step, round(1e-4 * step, 8)) for step in range(1, 7)]


def test_wandb_gets_steps_config_and_arguments(monkeypatch, tmp_path):
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger = WandBLogger(project="p", log_dir=str(tmp_path / "w"), id="abc", resume="allow")
    started = wandb.init.call_args.kwargs
    assert (started["project"], started["id"], started["resume"]) == ("p", "abc", "allow")
    logger.log("loss", torch.tensor(0.5), 3)
    logger.log_config(CONFIG)
    logger.close()
    session = wandb.init.return_value
    session.log.assert_called_once_with({"loss": 0.5, "global_step": 3})
    saved = session.config.update.call_args.args[0]
    assert saved["seed"] == 1 and SECRET not in str(saved)
    session.finish.assert_called_once_with()


def test_comet_gets_steps_and_config_and_no_code_by_default(monkeypatch):
    comet = MagicMock()
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    logger = CometLogger(experiment_name="e", workspace="w", online=False)
    assert comet.ExperimentConfig.call_args.kwargs["log_code"] is False
    assert comet.start.call_args.kwargs["workspace"] == "w"
    logger.log("loss", 0.5, 3)
    logger.log_config(CONFIG)
    logger.close()
    experiment = comet.start.return_value
    experiment.log_metrics.assert_called_once_with({"loss": 0.5}, step=3)
    assert SECRET not in experiment.log_asset_data.call_args.args[0]
    experiment.end.assert_called_once_with()


def test_mlflow_gets_steps_and_config(monkeypatch):
    mlflow = MagicMock()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    logger = MLFlowLogger("experiment", tracking_uri="file:x", run_id="abc")
    mlflow.start_run.assert_called_once_with(run_id="abc", run_name=None)
    logger.log("loss", 0.5, 3)
    logger.log_config(CONFIG)
    logger.close()
    mlflow.log_metrics.assert_called_once_with({"loss": 0.5}, step=3)
    assert SECRET not in mlflow.log_text.call_args.args[0]
    mlflow.end_run.assert_called_once_with()


@pytest.mark.parametrize(
    "build, module",
    [
        (lambda: TensorBoardLogger("x"), "tensorboard"),
        (WandBLogger, "wandb"),
        (CometLogger, "comet_ml"),
        (MLFlowLogger, "mlflow"),
    ],
)
def test_a_missing_package_comes_with_its_pip_command(monkeypatch, build, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ResourceError, match=rf"pip install {module}"):
        build()


def test_a_tracker_that_does_not_start_is_one_line_with_a_remedy(monkeypatch):
    failing = SimpleNamespace(init=MagicMock(side_effect=RuntimeError("no API key")))
    monkeypatch.setitem(sys.modules, "wandb", failing)
    with pytest.raises(ResourceError, match=r"no API key; log in with `wandb login`"):
        WandBLogger()


def test_metrics_that_a_run_does_not_go_on_from_are_kept(tmp_path, caplog):
    logger = DiskLogger(str(tmp_path))
    run(logger, 1, 2)
    logger.log_config(CONFIG)
    before = logger.path.read_bytes()
    logger.resume_at(0)
    run(logger, 1, 1)
    kept = next(tmp_path.glob("metrics.kept-*.jsonl"))
    assert kept.read_bytes() == before and f"it is now {kept.name}" in caplog.text
    assert len(list(tmp_path.glob("config.kept-*.yaml"))) == 1 and not list(
        tmp_path.glob("config.yaml")
    )
    assert len(read_metrics(logger.path)) == 1
