"""How `tune` ends: exit codes, one line per error, nothing secret, no noise in a pipe."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mytune import __version__, errors
from mytune.cli import registry
from mytune.cli.main import VERBS, main
from mytune.cli.report import report
from tests.cli.conftest import finish, start


def fail(error: BaseException) -> int:
    def work() -> int:
        raise error

    return report(work)


def test_tune_alone_and_help_list_every_command(tune):
    for words in ([], ["--help"], ["-h"]):
        code, out, _ = tune(*words)
        assert code == 0 and all(f"  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_explains_itself(tune, verb):
    code, out, err = tune(verb, "--help")
    assert code == 0 and out.startswith(f"usage: tune {verb}") and err == ""


def test_version(tune):
    assert tune("--version") == (0, f"mytune {__version__}\n", "")


def test_a_recipe_is_no_command(tune):
    code, _, err = tune("generate", "--config", "generation")
    assert code == 2 and err.endswith("no command: tune run generate --config generation\n")


@pytest.mark.parametrize(
    ("verb", "here"),
    [
        ("finetune", "tune run lora_finetune_single_device --config CONFIG"),
        ("eval", "tune run eleuther_eval --config eleuther_evaluation"),
        ("merge", "a LoRA run itself saves the merged model"),
        ("serve", "`tune chat DIR` talks with a model; `vllm serve DIR`"),
    ],
)
def test_a_command_of_another_library_is_told_what_it_is_here(tune, verb, here):
    code, _, err = tune(verb, "x")
    assert code == 2 and f"there is no command '{verb}'" in err and f"here it is: {here}" in err
    _, _, recipe = here.partition("tune run ")
    assert not recipe or recipe.split()[0] in registry.RECIPES


def test_misspelt_command_is_an_error_with_the_nearest_name(tune):
    code, out, err = tune("validat")
    assert (code, out) == (2, "")
    hint = "(`tune --help` lists them); did you mean 'validate'?"
    assert err == f"error: there is no command 'validat' {hint}\n"


def test_wrong_option_is_one_line_and_exit_2(tune):
    code, _, err = tune("ls", "--all")
    assert code == 2 and err == "error: unrecognized arguments: --all; see `tune ls --help`\n"
    code, _, err = tune("validate", "x", "--recip=y")
    hint = "settings are key=value, without --; did you mean '--recipe'?"
    assert err == f"error: unrecognized arguments: --recip=y; {hint}\n"
    code, _, err = tune("validate", "x", "--batch-size", "4")
    assert err.endswith("; settings are key=value, without --: batch_size=4\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.DataError("x"), 3),
        (errors.CheckpointError("x"), 4),
        (errors.ResourceError("x"), 5),
        (errors.NumericalError("x"), 6),
        (errors.DirectoryInUseError("x"), 7),
        (OSError(errno.ENOSPC, "No space left on device", "w.safetensors"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 5),
        (MemoryError("no 8 GiB"), 5),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you"), 5),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), 5),
        (ZeroDivisionError("x"), 70),
        (ModuleNotFoundError("No module named 'mytune.x'", name="mytune.x"), 70),
    ],
)
def test_every_kind_of_error_has_its_exit_code_and_one_line(capsys, error, code):
    assert fail(error) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_details_are_indented_below_the_message(capsys):
    fail(errors.ConfigError("two problems", ["first", "second"]))
    assert capsys.readouterr().err == "error: two problems\n  first\n  second\n"


def test_the_first_line_of_an_error_without_text_is_its_type():
    assert errors.first_line(ValueError("\n one\r\ntwo")) == "one"
    assert errors.first_line(OSError(" \n")) == "OSError"


def test_the_network_is_known_by_errors_and_not_by_words():
    far = type("ReadTimeout", (Exception,), {})("no answer")
    wrapped = ValueError("cannot load")
    wrapped.__cause__ = far
    for error in (ConnectionResetError("x"), socket.gaierror(-2, "x"), far, wrapped):
        assert errors.is_network(error)
    assert not errors.is_network(FileNotFoundError("me/offline-rl doesn't exist"))


def test_stopped_early_is_no_error(capsys):
    assert fail(errors.StoppedEarly("saved step_3")) == 75
    assert capsys.readouterr().err == "stopped early: saved step_3\n"


def test_ctrl_c_is_130_and_quiet(capsys):
    assert fail(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


def test_bug_names_the_line_and_keeps_the_traceback(capsys):
    assert fail(ZeroDivisionError("by zero")) == 70
    err = capsys.readouterr().err
    assert f"ZeroDivisionError: by zero ({__file__}:" in err and "--debug" in err
    kept = Path(re.search(r"traceback is in (\S+\.txt)", err)[1])
    assert "raise error" in kept.read_text()


def test_debug_prints_the_traceback(capfd):
    assert main(["cat", "--debug", "no/such"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: there is no config")


def test_secrets_are_not_printed(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    fail(errors.DataError("refused hf_0123456789abcdefghij", ["api_key=swordfish1"]))
    err = capsys.readouterr().err
    assert "0123456789" not in err and "swordfish1" not in err and "refused" in err


def test_a_pipe_closed_by_its_reader_is_quiet():
    process = start("-m", "mytune", "ls")
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert (code, err) == (141, "")


@pytest.mark.parametrize(
    ("redirected", "code"),
    [("2>&-", 0), (">&-", 0), ("<&-", 0), (">&- 2>&-", 0), ("2>/dev/full", 0), (">/dev/full", 5)],
)
def test_streams_that_are_closed_or_full(redirected, code, tmp_path):
    command = f"{sys.executable} -m mytune ls {redirected}"
    assert subprocess.run(command, shell=True, capture_output=True).returncode == code


@pytest.mark.parametrize("flag", ["", "--debug"])
def test_a_full_stderr_changes_no_exit_code(flag):
    command = f"{sys.executable} -m mytune {flag} lss 2>/dev/full"
    assert subprocess.run(command, shell=True).returncode == 2


def test_closed_streams_are_the_null_device_of_processes_too():
    child = "import os; print([os.fstat(fd).st_rdev for fd in (0, 1, 2)])"
    code = "import subprocess, sys, mytune.cli.report as report; report.open_streams();"
    code += f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code])
    assert done.returncode == 0


def test_what_a_stream_cannot_write_is_escaped():
    code = "import sys; from mytune.cli.report import *; open_streams(); print('Größe 日')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.stdout == rb"Gr\xf6\xdfe \u65e5" + b"\n"


def test_a_broken_pipe_elsewhere_is_not_silent(capsys):
    assert fail(BrokenPipeError(errno.EPIPE, "a logger's socket")) == 70
    assert "a logger's socket" in capsys.readouterr().err
