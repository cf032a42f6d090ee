"""Components: what may be named and built, and nothing else runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mytune.config import check_components, check_may_run, component, instantiate, read_config
from mytune.config.components import allow, find_component, refusal
from mytune.errors import ConfigError, ResourceError
from tests.config.conftest import CONFIG, Load

EVALUATION = Path(__file__).parents[2] / "recipes" / "eleuther_eval.py"


def test_a_component_is_called_with_its_arguments_and_keywords_win(folder: Path) -> None:
    node = component("my_parts.rows", source="a", packed=True, n=1)
    assert instantiate(node, packed=False, m=2) == ("rows", "a", False, {"n": 1, "m": 2})
    assert instantiate({"_component_": "my_parts.model"}, 3, inner=4) == ("model", 3, 4)


def test_components_in_arguments_are_built_first(folder: Path) -> None:
    inner = {"_component_": "my_parts.model", "size": 1}
    node = {"_component_": "my_parts.model", "size": 2, "inner": [inner, {"a": inner, "b": [5]}]}
    built = ("model", 1, None)
    assert instantiate(node) == ("model", 2, [built, {"a": built, "b": [5]}])


def test_whole_numbers_are_floats_where_these_are_by_default() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    built = instantiate({"_component_": "torch.optim.AdamW", "betas": [0, 0.99]}, [weight])
    assert list(map(type, built.defaults["betas"])) == [float, float]


def test_none_builds_nothing_and_a_list_builds_each(folder: Path) -> None:
    assert instantiate(None) is None
    nodes = [{"_component_": "my_parts.model"}, {"_component_": "my_parts.model", "inner": 1}]
    assert instantiate(nodes, 7) == [("model", 7, None), ("model", 7, 1)]


@pytest.mark.parametrize("node", ["my_parts.model", {"size": 1}, 3, {"_component_": 3}])
def test_what_is_no_component_is_an_error(folder: Path, node: Any) -> None:
    with pytest.raises(ConfigError, match="a component is a mapping with _component_"):
        instantiate(node)


def test_arguments_that_do_not_fit_are_an_error_before_the_call(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"my_parts\.model: missing a required argument: 'size'"):
        instantiate({"_component_": "my_parts.model"})


FOREIGN = [
    "os.system",
    "subprocess.run",
    "builtins.exec",
    "shutil.rmtree",
    "torch.load",
    "torch.hub.load",
    "torch.os.system",
    "torch.utils.cpp_extension.load",
    "mytune.cli.main.main",
    "mytune.config.instantiate",
    "mytune.errors.TuneError",
    "mytunes.models.x",
    "torchvision.models.resnet18",
]
IN_DISGUISE = [
    "torch.nn.modules.module.torch.load",
    "torch.nn.modules.linear.math.sqrt",
    "torch.nn.functional.importlib.import_module",
    "torch.nn.functional.warnings.warn",
    "torch.optim.optimizer.functools.partial",
    "torch.optim.optimizer.torch.hub.load",
    "mytune.models.lazy_names",
    "my_evil.os.system",
    "my_evil.run",
]
MALFORMED = [
    "model",
    ".x",
    "a..b",
    "torch.nn.Module.__init__",
    "torch.nn.Linear.__class__.mro",
    "a b.c",
    "",
    "os;system.x",
]


@pytest.mark.parametrize("name", FOREIGN + MALFORMED)
def test_a_foreign_name_is_refused_without_an_import(load: Load, name: str) -> None:
    assert refusal(name) is not None
    with pytest.raises(ConfigError):
        instantiate({"_component_": name})
    problems = load(yaml=CONFIG + f"optimizer: {{_component_: '{name}', x: 1}}\n").problems
    assert len(problems) == 1 and problems[0].startswith("c.yaml:5: optimizer._component_: ")


@pytest.mark.parametrize("name", IN_DISGUISE)
def test_an_object_that_comes_from_elsewhere_is_refused(folder: Path, name: str) -> None:
    (folder / "my_evil.py").write_text("import os\nfrom subprocess import run\n")
    with pytest.raises(
        ConfigError, match=r"is not allowed: it comes from|neither a function nor a class"
    ):
        find_component(name)


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.AdamW",
        "torch.nn.Linear",
        "torch.optim.lr_scheduler.StepLR",
        "torch.nn.CrossEntropyLoss",
        "torchao.optim.AdamW8bit",
        "torchao.quantization.Int8WeightOnlyConfig",
        "torchao.quantization.PerRow",
        "torchao.quantization.MappingType",
    ],
)
def test_what_belongs_there_is_found(folder: Path, name: str) -> None:
    assert find_component(name).__name__ == name.rpartition(".")[2]


# Each could be made to run or to write something.
NO_COMPONENTS = [
    "torchao.utils.benchmark_model",
    "torchao.prototype.pat.utils.instantiate_module",
    "torchao.quantization.quantize_",
    "torch.nn.functional.cross_entropy",
    "torch.nn.utils.rnn.pad_sequence",
    "torch.optim.swa_utils.update_bn",
]


@pytest.mark.parametrize("name", NO_COMPONENTS)
def test_functions_of_other_packages_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no class of these: .*--allow-component torch"):
        find_component(name)


def test_a_package_is_let_in_by_the_users_word(load: Load) -> None:
    yaml = CONFIG + "optimizer: {_component_: fractions.Fraction, numerator: 3}\n"
    assert "--allow-component fractions" in load(yaml=yaml).problems[0]
    loaded = load(yaml=yaml, allow=("fractions",))
    assert loaded.problems == []
    assert instantiate(loaded.values()["optimizer"]) == 3
    allow(["collections"])
    with pytest.raises(ConfigError, match="does not say which module"):
        find_component("collections._iskeyword")


def test_python_files_outside_the_current_directory_are_not_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = folder / "outside"
    inside = folder / "inside"
    for each in (outside, inside):
        each.mkdir()
    (outside / "far.py").write_text("def f(): return 1\n")
    (inside / "link.py").symlink_to(outside / "far.py")
    monkeypatch.chdir(inside)
    monkeypatch.syspath_prepend(outside)
    assert refusal("far.f") and refusal("link.f")


@pytest.mark.parametrize("name", ["json", "sched", "time"])
def test_a_file_named_like_an_installed_module_is_refused(load: Load, name: str) -> None:
    Path(f"{name}.py").write_text("open('ran', 'w')\ndef f(s): return 1\n")
    with pytest.raises(ConfigError, match=rf"{name}\.py is hidden by another module"):
        find_component(f"{name}.f")
    (problem,) = check_components(load(f"model={name}.f", "model.s=1"))
    assert f"{name}.py is hidden by another module called '{name}'" in problem
    assert not Path("ran").exists()


def test_a_folder_without_code_elsewhere_hides_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "far" / "my_name").mkdir(parents=True)
    monkeypatch.syspath_prepend(folder / "far")
    (folder / "my_name.py").write_text("def f(): return 1\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(folder))])
    assert instantiate({"_component_": "my_name.f"}) == 1


def test_the_line_of_a_component_that_raises_is_told(folder: Path) -> None:
    (folder / "my_box.py").write_text("def f(a):\n    g(a)\n\ndef g(a):\n    return int(a)\n")
    with pytest.raises(ConfigError, match=r"my_box\.f\(a='x'\): invalid .* \(.*/my_box\.py:5\)$"):
        instantiate({"_component_": "my_box.f", "a": "x"})


def test_a_component_file_that_is_no_python_is_named_with_its_line(load: Load) -> None:
    Path("my_typo.py").write_text("\ndef f(:\n")
    (problem,) = check_components(load("model=my_typo.f"))
    assert problem.endswith("/my_typo.py:2: not a Python file: invalid syntax")
    with pytest.raises(ConfigError, match=r"my_typo\.py cannot be imported: SyntaxError: .*line 2"):
        find_component("my_typo.f")


def test_local_packages_and_their_neighbours_are_importable(folder: Path) -> None:
    (folder / "my_pkg").mkdir()
    (folder / "my_pkg" / "deep.py").write_text("from my_near import N\ndef f(a): return N + a\n")
    (folder / "my_near.py").write_text("N = 1\n")
    assert instantiate({"_component_": "my_pkg.deep.f", "a": 2}) == 3


def test_an_unknown_component_is_told_the_nearest(folder: Path) -> None:
    for name, right in [
        ("torch.optim.AdmW", "AdamW"),
        ("mytune.models.lama3.llama3_8b", "llama3"),
        ("my_parts.modl", "model"),
    ]:
        with pytest.raises(
            ConfigError, match=f"unknown component '{name}'; did you mean '{right}'"
        ):
            find_component(name)


def test_a_missing_package_is_told_with_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ResourceError, match="needs the package bitsandbytes, which is not installed: pip install"
    ):
        find_component("bitsandbytes.optim.PagedAdamW8bit")


@pytest.mark.parametrize(
    "name",
    [
        "mytune.datasets.cache.load_or_write",
        "mytune.training.take",
        "mytune.training.checkpointing.publish.remove",
        "mytune.training.metric_logging._tracker",
        "mytune.config.components.allow",
        "mytune.cli.main.main",
    ],
)
def test_a_function_of_ours_that_no_config_is_made_of_is_refused(name: str) -> None:
    """`load_or_write` removes the folder it is given, `_tracker` imports any module."""
    with pytest.raises(ConfigError, match=r"(not a|unknown) component"):
        find_component(name)


def test_torchao_says_nothing_of_its_own_when_it_is_imported() -> None:
    code = "from mytune.config.components import find_component as f; f('torchao.optim.AdamW8bit')"
    loud = {k: v for k, v in os.environ.items() if k != "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"}
    done = subprocess.run([sys.executable, "-c", code], env=loud, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def may_run(*overrides: str, allowed: tuple[str, ...] = (), **own: Any) -> bool:
    """Say whether an evaluation runs the tasks of a config with these overrides."""
    config = Path("evaluation.yaml")
    config.write_text(yaml.safe_dump(own))
    values = read_config(EVALUATION, config, overrides, allow_components=allowed).resolved
    try:
        check_may_run(values["tasks"], values["include_path"])
    except ConfigError:
        return False
    return True


def test_tasks_that_a_config_alone_names_lie_below_the_current_directory(folder: Path) -> None:
    assert may_run(include_path="own", tasks=["dates", "own/more/x.yaml"])
    assert may_run(include_path="${asset:tasks}")
    for path in ("/elsewhere", "..", "~nobody/x", "own/../.."):
        assert not may_run(include_path=path)
        assert not may_run(tasks=[f"{path}/x.yaml"])
    assert may_run(include_path="/elsewhere/x", allowed=("/elsewhere",))


@pytest.mark.parametrize(
    "override",
    [
        "include_path=/elsewhere",
        'include_path="/elsewhere"',
        "include_path=${output_dir}",
        'tasks=["/elsewhere/a b/x.yaml",dates]',
        "include_path=../elsewhere",
    ],
)
def test_tasks_that_the_command_line_names_run(folder: Path, override: str) -> None:
    assert not may_run(output_dir="/elsewhere", include_path="/elsewhere")
    assert may_run(override, output_dir="/elsewhere")


def test_a_folder_of_tasks_lets_no_package_in(folder: Path) -> None:
    assert may_run("include_path=shutil")
    assert refusal("shutil.rmtree")
