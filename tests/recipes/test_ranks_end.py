"""Ranks that die or hang end the run in bounded time (R9) or start anew; two nodes are one run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mytune.cli import registry
from tests.recipes.conftest import assert_same_curve, metrics_of
from tests.recipes.ranks import free_port

pytestmark = pytest.mark.ranks
RECIPE = registry.ROOT / "recipes" / "finetune.py"
AT = "            lr = get_lr(optimizer)\n"


@pytest.fixture
def start(tmp_path, config):
    """Return a function that starts the recipe, with `line` in its step, under torchrun."""
    file = tmp_path / "ranks.yaml"
    config |= {"gradient_accumulation_steps": 1, "distributed_timeout": 4}
    started = []

    def begin(*options, line="", overrides=()):
        recipe = tmp_path / "mine.py"
        recipe.write_text(
            RECIPE.read_text()
            .replace(AT, f"{line}{AT}")
            .replace("import time\n", "import os\nimport signal\nimport time\n", 1)
        )
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "mytune", "run", *options, str(recipe)]
        process = subprocess.Popen(
            [*command, "--config", str(file), *overrides],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MARK": str(tmp_path)},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


def left_over(tmp_path):
    """Return the processes that have not ended, by what is in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={tmp_path}\0" in file.read_text():
                found.append(file.parent.name)
        except (OSError, UnicodeDecodeError):
            continue
    return found


SICK = "            if rank() == 1 and step == 1{when}:\n                {what}\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
ENDS = {
    DIE: (137, "error: rank 1 was killed by SIGKILL"),
    "time.sleep(600)": (5, "error: rank 0 lost the other ranks"),
    "raise ConfigError('no')": (2, "error: no"),
}


@pytest.mark.parametrize("what", ENDS)
def test_r9_a_rank_that_dies_or_hangs_ends_the_run(start, tmp_path, what):
    code, message = ENDS[what]
    process = start("--nproc_per_node=2", line=SICK.format(when="", what=what))
    began = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert process.returncode == code, err
    assert message in err and "Traceback" not in err and "a bug" not in err
    assert ("no word from rank 1" in err) == (code == 5)
    assert time.monotonic() - began < 60  # 30 s after the fault; starting takes some, too
    assert left_over(tmp_path) == []


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))"


def test_r10_a_rank_that_cannot_write_costs_only_the_new_checkpoint(start, run, config):
    config |= {"save_every_n_steps": 1, "batch_size": 4, "data_parallel_shard_dim": -1}
    config["enable_async_checkpointing"] = True
    expected = run({**config, "output_dir": config["output_dir"] + "_alone", "batch_size": 8})
    process = start("--nproc_per_node=2", line=SICK.format(when="", what=FULL_DISK))
    _, err = process.communicate(timeout=90)
    assert process.returncode == 5, err
    assert "error: a file would be larger than its limit" in err
    assert "/recipe_state/optimizer-00002-of-00002.safetensors" in err
    assert [path.name for path in Path(config["output_dir"]).glob("step_?")] == ["step_1"]
    process = start("--nproc_per_node=2", overrides=["resume_from_checkpoint=True"])
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0 and "step_1, after step 1" in err, err
    assert list(Path(config["output_dir"]).glob("*.tmp-*")) == []
    assert_same_curve(metrics_of(config), expected)


def test_ranks_that_torchrun_starts_anew_go_on_from_the_last_checkpoint(
    start, run, config, tmp_path
):
    config |= {"save_every_n_steps": 1, "batch_size": 4}
    first = " and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    expected = run({**config, "output_dir": config["output_dir"] + "_alone", "batch_size": 8})
    process = start(
        "--nproc_per_node=2", "--max-restarts=1", line=SICK.format(when=first, what=DIE)
    )
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "resuming from" in err and "starting anew (restart 1)" in err
    assert_same_curve(metrics_of(config), expected)


def test_a_run_asked_to_stop_while_it_loads_is_not_started_anew(start, config):
    process = start("--nproc_per_node=2", "--max-restarts=3")
    lock = Path(config["output_dir"], ".mytune.lock")
    while not lock.exists() and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode in (75, 143), err  # the first if it had just begun to train
    assert "resuming from" not in err


FAIL_AFTER_A_SIGNAL = (
    "os.kill(os.getppid(), signal.SIGTERM); time.sleep(1); raise ConfigError('no')"
)


def test_what_goes_wrong_after_a_signal_is_told(start):
    line = SICK.format(when="", what=FAIL_AFTER_A_SIGNAL)
    process = start("--nproc_per_node=2", "--max-restarts=1", line=line)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 2 and "error: no" in err, err


def test_what_is_refused_is_refused_again_when_torchrun_starts_anew(start, run, config):
    run(config)
    before = Path(config["output_dir"], "metrics.jsonl").read_bytes()
    process = start("--nproc_per_node=2", "--max-restarts=1", overrides=["seed=9"])
    _, err = process.communicate(timeout=90)
    assert process.returncode == 7 and "holds the results of another run" in err, err
    assert Path(config["output_dir"], "metrics.jsonl").read_bytes() == before


def test_two_nodes_make_one_run(start, run, config):
    """Two agents of torchrun, as on two machines; each starts one rank."""
    config |= {"data_parallel_shard_dim": -1}
    expected = run({**config, "output_dir": config["output_dir"] + "_alone", "batch_size": 8})
    address = [f"--master_port={free_port()}", "--master_addr=127.0.0.1", "--nnodes=2"]
    nodes = [start(*address, "--nproc_per_node=1", f"--node_rank={node}") for node in (0, 1)]
    for node in nodes:
        _, err = node.communicate(timeout=90)
        assert node.returncode == 0, err
    assert_same_curve(metrics_of(config), expected)
