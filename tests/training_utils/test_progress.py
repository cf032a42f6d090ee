"""Log lines and progress, on a terminal and in a pipe."""

from __future__ import annotations

import io
import logging

import pytest

from mytune.errors import ConfigError
from mytune.training.progress import ProgressBar, log, setup_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restore_logger():
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


def test_in_a_pipe_progress_is_plain_lines_every_5_percent():
    file = io.StringIO()
    with ProgressBar(1000, file=file) as progress:
        for step in range(1, 1001):
            progress.update(step, 1 / step, 12345.6)
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue() and len(lines) == 21
    assert lines[0].startswith("step 1/1000 (0%)  loss 1.0000  12,346 tokens/s  00:00 elapsed")
    assert lines[-1].startswith("step 1000/1000 (100%)  loss 0.0010")


def test_in_a_pipe_a_slow_run_says_something_every_30_seconds(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    file = io.StringIO()
    progress = ProgressBar(10_000, done=100, file=file)
    for step in range(101, 112):
        now += 10
        progress.update(step, 1.0, 1.0)
    steps = [line.split()[1] for line in file.getvalue().splitlines()]
    assert steps == ["101/10000", "104/10000", "107/10000", "110/10000"]
    assert "01:40 elapsed, 27:28:20 left" in file.getvalue()


def test_on_a_terminal_there_is_one_bar_with_loss_and_speed():
    file = Terminal()
    with ProgressBar(4, done=2, file=file) as progress:
        progress.update(3, 1.25, 2000.0)
        progress.update(4, 1.125, 2000.0)
    last = file.getvalue().split("\r")[-1]
    assert "4/4" in last and "loss 1.1250, 2,000 tokens/s" in last


def test_other_ranks_show_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for file in (io.StringIO(), Terminal()):
        with ProgressBar(2, file=file) as progress:
            progress.update(1, 1.0, 1.0)
        assert file.getvalue() == ""


def test_log_lines_do_not_tear_the_bar(monkeypatch):
    file = Terminal()
    monkeypatch.setattr("sys.stderr", file)
    setup_logging("INFO")
    with ProgressBar(10) as progress:
        progress.update(5, 1.0, 1.0)
        log.info("saved")
    lines = [line.rpartition("\r")[2] for line in file.getvalue().split("\n")]
    assert "saved" in lines


def test_log_lines_are_plain_and_said_once(capsys):
    setup_logging("INFO")
    setup_logging("info")
    log.debug("hidden")
    log.info("locations: %s", "here")
    log.warning("look out")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "locations: here\nwarning: look out\n")


def test_log_lines_hold_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    setup_logging()
    log.info("token is %s", "very-secret-value")
    assert "very-secret-value" not in capsys.readouterr().err


def test_other_ranks_say_errors_only(capsys):
    setup_logging("DEBUG", rank=3)
    log.warning("nothing")
    log.error("lost")
    assert capsys.readouterr().err == "[rank 3] error: lost\n"


def test_a_wrong_level_is_a_config_error():
    with pytest.raises(ConfigError, match=r"log_level is 'INFOS'; did you mean 'INFO'"):
        setup_logging("INFOS")
    assert logging.getLogger("mytune") is log
