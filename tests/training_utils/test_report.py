"""Summary and loss curve."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from mytune.training.metric_logging import DiskLogger
from mytune.training.report import draw_loss_curve, write_report

FACTS = {
    "steps": 3,
    "tokens": 6000,
    "seconds": 2.0,
    "parameters": (1000, 10),
    "device": torch.device("cpu"),
}


@pytest.fixture
def folder(tmp_path):
    logger = DiskLogger(str(tmp_path))
    for step, loss in enumerate((3.0, 1.0, 2.0), start=1):
        logger.log_dict({"loss": loss, "lr": 1e-4, "peak_memory_alloc": 4.0 - step}, step)
    logger.log("val_loss", 1.5, 3)
    return tmp_path


def test_the_summary_says_what_the_run_did(folder):
    written = write_report(
        folder,
        **FACTS,
        metrics=folder / "metrics.jsonl",
        locations={"checkpoint": folder / "epoch_0"},
    )
    summary = json.loads(written["summary"].read_text())
    expected = {
        "final_loss": 2.0,
        "best_loss": 1.0,
        "best_loss_step": 2,
        "final_val_loss": 1.5,
        "best_val_loss": 1.5,
        "steps": 3,
        "tokens_per_second": 3000.0,
        "peak_memory_alloc": 3.0,
        "parameters": 1000,
        "parameters_trained": 10,
    }
    assert {name: summary[name] for name in expected} == expected
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["locations"]["checkpoint"] == str(folder / "epoch_0")


def test_the_loss_curve_is_a_png(folder):
    pytest.importorskip("matplotlib")
    written = write_report(folder, **FACTS, metrics=folder / "metrics.jsonl")
    assert written["loss_curve"].read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in folder.iterdir()}
    assert names == {"metrics.jsonl", "summary.json", "loss_curve.png"}


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_a_curve_of_any_length_is_drawn_without_a_warning(steps, recwarn):
    pytest.importorskip("matplotlib")
    rows = [{"step": step, "loss": 1 / step, "lr": None} for step in range(1, steps + 1)]
    assert draw_loss_curve(rows).startswith(b"\x89PNG")
    assert not list(recwarn)


def test_without_matplotlib_the_summary_is_written_and_the_pip_command_said(
    folder, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("mytune.training.report.log.propagate", True)
    caplog.set_level("INFO", "mytune")
    assert list(write_report(folder, **FACTS, metrics=folder / "metrics.jsonl")) == ["summary"]
    assert "pip install matplotlib" in caplog.text


def test_without_a_log_there_is_still_a_summary(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 8.0}\n')  # of an earlier stretch
    assert list(write_report(tmp_path, **FACTS)) == ["summary"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 3 and "final_loss" not in summary


def test_other_ranks_write_nothing(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert write_report(folder, **FACTS) == {}
    assert not (folder / "summary.json").exists()
