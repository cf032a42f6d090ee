"""`tune ls`, `cat`, `cp`, `completion` and the registry behind them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from mytune.cli import registry
from mytune.config import load_config
from mytune.errors import ConfigError
from tests.cli.conftest import RECIPE, finish, start

NAME = "fam/1B_lora_single_device"


def test_every_shipped_config_belongs_to_exactly_one_recipe():
    owners = {
        name: [r.name for r in registry.RECIPES.values() if name in r.configs()]
        for name in registry.configs()
    }
    assert owners and {name: found for name, found in owners.items() if len(found) != 1} == {}


def test_ls_lists_recipes_with_their_configs(tune, root):
    (root / "configs" / "fam" / "1B_full.yaml").write_text("output_dir: x\n")
    code, out, err = tune("ls")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["RECIPE", "CONFIG"],
        ["full_finetune_single_device", "(no", "config)"],
        ["full_finetune_distributed", "fam/1B_full"],
        ["lora_finetune_single_device", NAME],
        ["lora_finetune_distributed", "(no", "config)"],
    ]


def test_ls_of_one_recipe(tune, root):
    code, out, _ = tune("ls", "lora_finetune_single_device")
    assert code == 0 and out.split() == ["RECIPE", "CONFIG", "lora_finetune_single_device", NAME]
    code, _, err = tune("ls", "lora_finetune_single")
    assert code == 2 and err.endswith("did you mean 'lora_finetune_single_device'?\n")


def test_cat_prints_every_key_with_its_comment(tune, root):
    code, out, _ = tune("cat", NAME)
    assert code == 0
    assert out == (
        "# Where results go.\noutput_dir: out\n# How to end.\nend: well\n"
        "# Rows per batch.\nbatch_size: 4\n"
    )


def test_cat_sorts_keys_and_reads_files(tune, root):
    (root.parent / "cwd" / "my.yaml").write_text("output_dir: mine\n")
    code, out, _ = tune("cat", "my.yaml", "--sort")
    keys = [line.partition(":")[0] for line in out.splitlines() if not line.startswith("#")]
    assert code == 0 and keys == ["batch_size", "end", "output_dir"] and "output_dir: mine" in out


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fam/1B_lora_singel_device", f"did you mean '{NAME}'?"),
        ("missing.yaml", "there is no file missing.yaml"),
        (
            "lora_finetune_single_device",
            "is a recipe: `tune ls lora_finetune_single_device` lists",
        ),
    ],
)
def test_cat_of_what_is_no_config_says_what_is(tune, root, name, hint):
    code, _, err = tune("cat", name)
    assert code == 2 and hint in err


def test_cp_of_a_recipe_is_the_file_itself(tune, root):
    code, out, _ = tune("cp", "lora_finetune_distributed", "mine")
    copied = root.parent / "cwd" / "mine.py"
    assert (code, out) == (0, "Copied file to mine.py\n")
    assert copied.read_text() == RECIPE


def test_cp_of_a_config_stands_alone_and_means_the_same(tune, root):
    assert tune("cp", NAME, "mine.yaml").code == 0
    copied = root.parent / "cwd" / "mine.yaml"
    recipe = registry.find_recipe("lora_finetune_single_device")
    same = load_config(recipe, registry.config_path(NAME)).values()
    assert load_config(recipe, copied).values() == same
    assert "# Rows per batch.\nbatch_size: 4\n" in copied.read_text()
    assert "tune run lora_finetune_single_device --config mine.yaml" in copied.read_text()


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        (".", "1B_lora_single_device.yaml"),
        ("there", "there/1B_lora_single_device.yaml"),
        ("there/my_v1.2", "there/my_v1.2.yaml"),
        ("new/", "new/1B_lora_single_device.yaml"),
    ],
)
def test_cp_into_a_folder_or_without_a_suffix(tune, root, destination, expected):
    cwd = root.parent / "cwd"
    (cwd / "there").mkdir()
    assert tune("cp", NAME, destination, "--make-parents").code == 0
    assert [str(f.relative_to(cwd)) for f in cwd.rglob("*.yaml")] == [expected]


def test_cp_never_changes_a_suffix(tune, root):
    code, _, err = tune("cp", "lora_finetune_single_device", "mine.yaml")
    assert code == 2 and ".py" in err and not (root.parent / "cwd" / "mine.yaml").exists()


def test_cp_keeps_what_was_there_under_another_name(tune, root):
    there = root.parent / "cwd" / "mine.py"
    there.write_text("old")
    code, out, _ = tune("cp", "-n", "lora_finetune_single_device", "mine")
    assert (code, there.read_text()) == (0, "old") and "not overwriting" in out
    for time in range(2):  # the second time there is nothing to keep
        code, out, _ = tune("cp", "lora_finetune_single_device", "mine")
        assert code == 0 and ("what was there is now mine.py.1" in out) == (time == 0)
    assert there.read_text() == RECIPE and there.with_name("mine.py.1").read_text() == "old"
    there.write_text("new")
    assert "is now mine.py.2" in tune("cp", "lora_finetune_single_device", "mine").out
    assert {p.name for p in there.parent.iterdir()} == {"mine.py", "mine.py.1", "mine.py.2"}


def test_cp_into_a_missing_folder_asks_for_make_parents(tune, root):
    code, _, err = tune("cp", NAME, "a/b/c.yaml")
    assert code == 2 and "--make-parents" in err
    assert tune("cp", NAME, "a/b/c.yaml", "--make-parents").code == 0


def test_cp_of_an_unknown_name_says_the_nearest(tune, root):
    code, _, err = tune("cp", "full_finetune", "x")
    assert code == 2 and "did you mean 'full_finetune_" in err


def test_config_file_is_taken_for_the_recipe_it_fits_best(root, tmp_path):
    other = RECIPE.replace("output_dir", "prompt").replace("batch_size", "temperature")
    (root / "recipes" / "generate.py").write_text(other)
    (tmp_path / "a.yaml").write_text("prompt: hi\ntemperatur: 1\n")
    (tmp_path / "b.yaml").write_text("output_dir: hi\nbatch_siz: 1\n")
    assert registry.recipe_for(str(tmp_path / "a.yaml")).name == "generate.py"
    assert registry.recipe_for(str(tmp_path / "b.yaml")).name == "finetune.py"


@pytest.mark.parametrize(
    "name", ["mine.py", "./mine.py", "mine", "{cwd}/mine.py", "../cwd/mine.py"]
)
def test_recipe_may_be_any_path(root, name):
    cwd = root.parent / "cwd"
    (cwd / "mine.py").write_text(RECIPE)
    assert registry.find_recipe(name.format(cwd=cwd)) == cwd / "mine.py"


def test_misspelt_recipe_is_an_error_with_the_nearest_name(root):
    with pytest.raises(ConfigError, match="did you mean 'lora_finetune_distributed'"):
        registry.find_recipe("lora_finetune_distribute")
    with pytest.raises(ConfigError, match="did you mean 'eleuther_eval'"):
        registry.find_recipe("eval")
    with pytest.raises(ConfigError, match="a command, no recipe: tune download"):
        registry.find_recipe("download")
    with pytest.raises(ConfigError, match=r"there is no file x\.py"):
        registry.find_recipe("x.py")


@pytest.mark.parametrize("name", ["qat_distributed", "lora_dpo_distributed", "dev/generate_v2"])
@pytest.mark.parametrize("verb", [("run",), ("ls",), ("cp", "there")], ids=str)
def test_a_recipe_of_torchtunes_that_is_not_here_has_no_nearest(tune, verb, name):
    code, _, err = tune(verb[0], name, *verb[1:])
    assert code == 2 and err.endswith("torchtune's that is not here: docs/from_torchtune.md\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_names_and_flags(tune, shell):
    code, out, _ = tune("completion", shell)
    assert code == 0
    assert all(w in out for w in ("validate", "lora_finetune_distributed", "--make-parents"))
    if binary := shutil.which(shell):
        subprocess.run([binary, "-n"], input=out, text=True, check=True)


def test_bash_completes_a_recipe():
    typed = "COMP_WORDS=(tune run lora_finetune_s) COMP_CWORD=2"
    script = f'eval "$(cat)"; {typed}; _tune; echo "${{COMPREPLY[@]}}"'
    out = finish(start("-m", "mytune", "completion", "bash")).out
    found = subprocess.run(
        ["bash", "-c", script], input=out, text=True, capture_output=True, check=True
    )
    assert found.stdout == "lora_finetune_single_device\n"
