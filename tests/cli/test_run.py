"""`tune run` and `tune validate`: what is checked, what is run, how it ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from mytune.cli.run import split
from mytune.errors import ConfigError
from tests.cli.conftest import Ended, finish, start

NAME = "fam/1B_lora_single_device"
LORA = ("lora_finetune_single_device", "--config", NAME)

READER = """
import os
from dataclasses import dataclass


@dataclass
class Config:
    {key}: int = 1


def main(cfg):
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.fixture
def mine(root: Path) -> Path:
    """A recipe of the user's own, in a folder that is not the current one."""
    recipe = root.parent / "elsewhere" / "mine.py"
    recipe.parent.mkdir()
    recipe.write_text((root / "recipes" / "finetune.py").read_text())
    return recipe


def launch(*words: object) -> Ended:
    return finish(start("-m", "mytune", "run", *map(str, words)))


# --- in this process ---


def test_run_gives_the_recipe_its_config(tune, root):
    assert tune("run", *LORA) == (0, "rank 0 of 1: out 4\n", "")


@pytest.mark.parametrize("config", [["--config", NAME], [f"--config={NAME}"]])
def test_config_may_stand_anywhere_and_overrides_win(tune, root, config):
    words = ["lora_finetune_single_device", "batch_size=8", *config, "output_dir=a=b"]
    assert tune("run", *words).out == "rank 0 of 1: a=b 8\n"


def test_tilde_takes_a_key_back_to_its_default(tune, root):
    assert tune("run", *LORA, "~batch_size").out == "rank 0 of 1: out 2\n"


def test_copied_recipe_runs_from_any_folder(tune, root, mine):
    assert tune("run", str(mine), "--config", NAME).out == "rank 0 of 1: out 4\n"
    assert tune("run", "../elsewhere/mine.py", "output_dir=x").out == "rank 0 of 1: x 2\n"


def test_copied_recipe_is_importable_under_its_name_while_it_runs(tune, mine):
    check = "import beside, pickle; assert pickle.loads(pickle.dumps(cfg)) == cfg\n    "
    mine.write_text(mine.read_text().replace("rank, ranks", check + "rank, ranks", 1))
    (mine.parent / "beside.py").write_text("")
    assert tune("run", str(mine), "output_dir=x").code == 0


def test_a_recipe_below_the_current_folder_imports_what_is_in_it(root):
    text = (root / "recipes" / "finetune.py").read_text()
    text = text.replace("import os", "import os\nimport near_loss", 1)
    folder = root.parent / "cwd"
    (folder / "pk").mkdir()
    (folder / "near_loss.py").write_text("")
    (folder / "pk" / "mine.py").write_text(text)
    words = ["-P", "-m", "mytune", "run"]
    assert finish(start(*words, "pk/mine.py", "output_dir=x")).code == 0
    (root.parent / "far.py").write_text(text)
    code, _, err = finish(start(*words, "../far.py", "output_dir=x"))
    assert code == 5 and "no module 'near_loss'" in err and "near_loss.py is here" in err
    (folder / "near_loss.py").unlink()
    err = finish(start(*words, "../far.py", "output_dir=x")).err
    assert err == "error: the package 'near_loss' is not installed: pip install it\n"


def test_a_recipe_of_ours_imports_nothing_from_the_current_folder(tune, root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(root))])
    assert tune("run", *LORA).code == 0 and str(root) not in sys.path
    (root / "mine.py").write_text((root / "recipes" / "finetune.py").read_text())
    assert tune("run", "mine.py", "output_dir=x").code == 0 and str(root) == sys.path[-1]


WITH_A_PART = """
from dataclasses import dataclass

from mytune.config import Component, instantiate
from mytune.errors import shortened


@dataclass(kw_only=True)
class Config:
    part: Component


def main(cfg):
    part = instantiate(cfg.part)
    USE
"""
PARTS = """from mytune.errors import shortened
def none(): return None
def fails(): return 1 / 0
def late(): return lambda: {}["x"]
def calls(): return lambda: shortened(None)
"""


@pytest.mark.parametrize(
    ("part", "use", "code", "told"),
    [
        ("my_part.none", "shortened(part)", 2, "; it may be in my_part.py, a component of yours;"),
        ("my_part.fails", "pass", 2, ": division by zero (HERE:3), a component of yours; the"),
        ("my_part.late", "part()", 2, "KeyError: 'x' (HERE:4), a component of yours; the traceb"),
        ("my_part.calls", "part()", 2, "; it may be in HERE:5, a component of yours; the traceb"),
        ("my_part.none", "1 / 0", 70, "error: a bug: ZeroDivisionError: division by zero"),
        ("torch.nn.Identity", "shortened(None)", 70, "error: a bug of mytune: TypeError"),
        ("my_part.none", "open('/proc/self/mem/x')", 70, "error: a bug: NotADirectoryError"),
    ],
)
def test_what_may_be_in_a_component_of_the_users_is_no_bug_of_ours(
    tune, root, part, use, code, told
):
    sys.modules.pop("my_part", None)
    Path("mine.py").write_text(WITH_A_PART.replace("USE", use))
    Path("my_part.py").write_text(PARTS)
    ended = tune("run", "mine.py", f"part={part}")
    assert (
        ended.code == code and told.replace("HERE", str(Path("my_part.py").resolve())) in ended.err
    )


@pytest.mark.parametrize(("end", "code"), [("code", 6), ("data", 3), ("bug", 70)])
def test_end_of_the_recipe_is_the_exit_code(tune, root, end, code):
    assert tune("run", *LORA, f"end={end}").code == code


def test_all_problems_are_reported_before_the_recipe_is_imported(tune, root):
    recipe = root / "recipes" / "finetune.py"
    recipe.write_text(recipe.read_text().replace("import os", "import os\nprint('imported')"))
    code, out, err = tune("run", *LORA, "batch_siz=3", "batch_size=two", "end")
    assert (code, out) == (2, "")
    assert err.startswith("error: the config has 3 problems\n")
    assert "did you mean 'batch_size'" in err and "'batch_size=two'" in err and "'end'" in err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["lora_finetune_single_devise"], "did you mean 'lora_finetune_single_device'"),
        (["lora_finetune_single_device"], f"--config is missing: a YAML file, or one of {NAME}"),
        (
            ["lora_finetune_single_device", "my.yaml"],
            "did you mean --config my.yaml?",
        ),
        (["lora_finetune"], "'lora_finetune_distributed' or 'lora_finetune_single_device'"),
        (["full_finetune_single_device", "--config", NAME], f"--config {NAME}`"),
        ([*LORA, "--nproc_per_node", "2"], "torchrun's options come before the recipe"),
        ([*LORA, "--batch-size=2"], "settings are key=value; write batch_size=2\n"),
        ([*LORA, "--batch-size", "2", "end=x"], "settings are key=value; write batch_size=2\n"),
        ([*LORA, "--end.x", "end=x"], "settings are key=value; write end.x=...\n"),
        ([*LORA, "--micro_batch_size", "2"], "settings are key=value; write batch_size=2\n"),
        (["lora_finetune_single_device", "--conifg=x"], "did you mean '--config'?"),
        (["--no_such_option=1", *LORA], "torchrun's options: unrecognized arguments: --no_such"),
        (
            ["--nproc_per_node", "2", "generate", "--config", "generation"],
            "generate runs in one process: leave out --nproc",
        ),
        (["--nproc_per_node", "many", *LORA], "--nproc-per-node many: Unsupported"),
        (["--nproc_per_node", "0", *LORA], "--nproc-per-node is 0; it must be at least 1"),
        ([*LORA[:1], "--config", ""], "argument --config: its value is empty"),
        ([*LORA, "--allow-component="], "argument --allow-component: its value is empty"),
        (["--nnodes", "x", *LORA], "--nnodes is x; it can be a number or MIN:MAX"),
        (["-m", *LORA], "`tune run` starts the recipe itself"),
        ([], "the following arguments are required: RECIPE"),
        (["full_finetune_single_device", "--config"], "expected one argument"),
    ],
)
def test_wrong_command_line_says_what_is_right(tune, root, words, hint):
    code, out, err = tune("run", *words)
    assert (code, out) == (2, "") and hint in err and err.count("\n") == 1


def test_config_of_another_recipe_is_refused_with_the_right_line(tune, root):
    (root / "recipes" / "generate.py").write_text((root / "recipes" / "finetune.py").read_text())
    code, _, err = tune("run", "generate", "--config", NAME)
    assert code == 2 and f"`tune run lora_finetune_single_device --config {NAME}`" in err


def test_recipe_without_main_is_a_config_error(tune, mine):
    mine.write_text(mine.read_text().replace("def main", "def other"))
    code, _, err = tune("run", str(mine), "output_dir=x")
    assert code == 2 and "def main(cfg: Config)" in err


def test_recipe_can_be_a_script(mine):
    ended = finish(start(str(mine), "output_dir=x", "batch_size=7", "end=data"))
    assert ended.code == 3 and ended.out == "rank 0 of 1: x 7\n"
    assert ended.err == "error: rows.jsonl:3: no output\n  row 3\n  row 4\n"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's tunables")
def test_what_trains_nothing_has_its_memory_in_huge_pages(tmp_path):
    def tunables(key: str, **variables: str) -> str:
        (tmp_path / "mine.py").write_text(READER.format(key=key))
        process = start("-m", "mytune", "run", "mine.py", cwd=tmp_path, env=plain | variables)
        pid, said = finish(process).out.split()
        assert int(pid) == process.pid
        return said

    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    assert tunables("prompt") == "glibc.malloc.hugetlb=1"
    assert tunables("optimizer") == "None"
    assert tunables("prompt", GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == "glibc.malloc.hugetlb=0"


def test_torchrun_options_are_told_from_the_recipe():
    words = ["--nproc_per_node", "2", "--standalone", "--rdzv-endpoint=h:1", "rec", "--config", "c"]
    assert split(words) == (words[:4], words[4:])
    with pytest.raises(ConfigError, match="no-python"):
        split(["--no_python", "rec"])


# --- validate ---


def test_validate_accepts_names_files_and_overrides(tune, root):
    code, out, err = tune("validate", NAME, "batch_size=8")
    assert (code, err) == (0, "") and out.startswith(f"Config is well-formed: {NAME}\n")
    assert "  Checked against finetune.py: 3 keys" in out
    Path("my.yaml").write_text("output_dir: x\n")
    assert tune("validate", "my.yaml").code == 0


def test_validate_names_line_and_override_of_every_problem(tune, root):
    Path("my.yaml").write_text("output_dir: x\nbatch_siz: 3\nend: [a]\n")
    code, out, err = tune("validate", "my.yaml", "batch_size=x")
    assert (code, out) == (2, "")
    assert "my.yaml:2: " in err and "my.yaml:3: " in err and "override 'batch_size=x'" in err


def test_validate_against_a_recipe_of_the_users_own(tune, root, mine):
    mine.write_text(mine.read_text().replace("batch_size", "rows"))
    Path("my.yaml").write_text("output_dir: x\nrows: 3\n")
    assert tune("validate", "my.yaml", "--recipe", str(mine)).code == 0
    code, _, err = tune("validate", "my.yaml")
    assert code == 2 and err.startswith("notice: checked as a config of finetune.py; --recipe NAME")
    assert "notice" not in tune("validate", "my.yaml", "--recipe", "full_finetune_distributed").err
    assert "notice" not in tune("validate", NAME, "rows=3").err


def test_validate_says_of_a_file_for_another_library_that_it_is_none_of_ours(tune, root):
    Path("trl.yaml").write_text("output_dir: x\nmicro_batch_size: 1\nfoo: 2\n")
    code, _, err = tune("validate", "trl.yaml")
    assert code == 2 and err.splitlines() == [
        "error: trl.yaml is no config of a recipe here: of its 3 keys none has more than 1; begin"
        " with `tune cp CONFIG my.yaml` (`tune ls` lists them), or name a recipe of yours:"
        " --recipe FILE",
        "  micro_batch_size: here it is batch_size",
    ]
    assert "unknown key 'foo'" in tune("validate", "trl.yaml", "--recipe", LORA[0]).err
    Path("ours.yaml").write_text("output_dir: x\nmicro_batch_size: 1\nlow_cpu_ram: true\n")
    assert "unknown key 'micro_batch_size'" in tune("validate", "ours.yaml").err


# --- under torchrun ---


@pytest.mark.ranks
def test_torchrun_starts_ranks_that_share_the_cores(mine, monkeypatch):
    ended = launch("--nproc_per_node", 2, mine, "output_dir=x", "batch_size=9")
    assert ended.code == 0 and ended.err == ""
    assert sorted(ended.out.splitlines()) == ["rank 0 of 2: x 9", "rank 1 of 2: x 9"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    mine.write_text(mine.read_text().replace("{cfg.batch_size}", "{os.environ['OMP_NUM_THREADS']}"))
    named = mine.rename(mine.with_name("mine_distributed.py"))  # torchrun without an option
    ended = launch(named, "output_dir=x", "end=code")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    assert (ended.code, ended.out) == (6, f"rank 0 of 1: x {cores}\n")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("end", "code", "err"),
    [
        ("data", 3, "error: rows.jsonl:3: no output\n  row 3\n  row 4\n"),
        ("one rank", 6, "error: the loss is nan\n"),
    ],
)
def test_exit_code_and_message_come_through_torchrun_once(mine, end, code, err):
    ended = launch("--nproc-per-node=2", mine, "output_dir=x", f"end={end}")
    assert (ended.code, ended.err) == (code, err)


@pytest.mark.ranks
def test_killed_rank_is_named_and_ends_the_others_even_if_they_hang(mine):
    began = time.monotonic()
    ended = launch("--nproc-per-node=2", mine, "output_dir=x", "end=killed")
    assert ended.code == 128 + signal.SIGKILL
    assert ended.err.startswith("error: rank 1 was killed by SIGKILL")
    assert time.monotonic() - began < 60


@pytest.mark.ranks
def test_wrong_config_is_reported_once_and_starts_no_rank(mine):
    ended = launch("--nproc-per-node=2", mine, "output_dir=x", "batch_size=two")
    assert ended.code == 2 and ended.out == "" and ended.err.count("batch_size=two") == 1


@pytest.mark.ranks
def test_sigterm_reaches_every_rank_and_the_run_ends_with_75(mine):
    process = start(
        "-m", "mytune", "run", "--nproc-per-node=2", mine, "output_dir=x", "end=stopped"
    )
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines.count("waiting\n") == 2
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert (ended.code, ended.err) == (75, "stopped early: saved step_3\n")


@pytest.mark.ranks
def test_ranks_do_not_outlive_their_launcher(mine):
    process = start(
        "-m", "mytune", "run", "--nproc-per-node=2", mine, "output_dir=x", "end=stopped"
    )
    while "waiting" not in process.stdout.readline():
        pass
    process.kill()
    began = time.monotonic()
    process.communicate(timeout=20)  # returns when the last rank has closed the pipe
    assert time.monotonic() - began < 10
