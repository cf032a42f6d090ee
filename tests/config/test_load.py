"""A config is checked whole: keys, types, references; every problem with its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mytune.config import load_config
from mytune.errors import ConfigError
from tests.config.conftest import CONFIG, Load


def test_defaults_file_and_overrides_are_laid_over_each_other(load: Load) -> None:
    yaml = CONFIG + "batch_size: 4\ndataset: {packed: true}\nextra: {x: {z: 2}}\n"
    values = load("dtype=fp32", "extra.x.w=3", yaml=yaml).values()
    assert values == {
        "output_dir": "out",
        "seed": None,
        "model": {"_component_": "my_parts.model", "size": 3},
        "dataset": {"_component_": "my_parts.rows", "source": "a", "packed": True},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "fused": True},
        "lr_scheduler": None,
        "batch_size": 4,
        "lr_scale": 1.0,
        "shuffle": True,
        "dtype": "fp32",
        "tags": ["a", "b"],
        "extra": {"x": {"y": 1, "z": 2, "w": 3}},
        "note": None,
    }


def test_a_component_named_in_the_file_takes_nothing_from_the_default(load: Load) -> None:
    values = load(yaml=CONFIG + "optimizer: {_component_: torch.optim.AdamW, lr: 1.0}\n").values()
    assert values["optimizer"] == {"_component_": "torch.optim.AdamW", "lr": 1.0}


def test_loading_twice_does_not_share_or_change_values(load: Load) -> None:
    first = load("extra.x.y=5")
    first.values()["tags"].append("mine")
    assert first.values()["tags"] == ["a", "b"]
    assert load().values()["extra"] == {"x": {"y": 1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size: 1.5", "batch_size: 1.5 is not a whole number"),
        ("batch_size: '3x'", "batch_size: '3x' is not a whole number"),
        ("batch_size: null", "batch_size: null is not a whole number"),
        ("batch_size: true", "batch_size: True is not a whole number"),
        ("lr_scale: fast", "lr_scale: 'fast' is not a number"),
        ("shuffle: maybe", "shuffle: 'maybe' is not true or false"),
        ("dtype: fp3", "dtype: 'fp3' is not one of 'bf16', 'fp32'; did you mean 'fp32'?"),
        ("tags: a", "tags: 'a' is not a list of texts; write [a]"),
        ("tags: [[a]]", "tags: [['a']] is not a list of texts"),
        ("extra: 3", "extra: 3 is not dict[str, Any]"),
        ("optimizer: 3", "optimizer: 3 is not a component"),
        (
            "optimizer: null",
            "optimizer: null is not a component, a mapping with _component_; leave the key out",
        ),
        ("optimizer: {lr: 1, _component_: 3}", "optimizer._component_: 3 is not a dotted name"),
        (
            "optimizer: {_component_: a/my-rows.jsonl}",
            "optimizer._component_: 'a/my-rows.jsonl' is a file, not a component",
        ),
        (
            "optimizer: {_component_: Int8WeightOnlyQuantizer}",
            "optimizer._component_: 'Int8WeightOnlyQuantizer' is not a dotted name; "
            "did you mean 'mytune.quantization.Int8WeightOnlyQuantizer'?",
        ),
        ("lr_scheduler: {lr: 1}", "lr_scheduler: {'lr': 1} is not a component"),
        ("dataset: [{source: a}]", "dataset: [{'source': 'a'}] is not a component"),
        ("dataset: null", "dataset: null is not a component"),
        ("note: ???", "note: ??? stands for a value that is still to be given"),
        ("lerning_rate: 3", "unknown key 'lerning_rate'"),
        ("batchsize: 3", "unknown key 'batchsize'; did you mean 'batch_size'?"),
    ],
)
def test_a_wrong_value_has_its_line_and_what_is_right(load: Load, line: str, message: str) -> None:
    problems = load(yaml=CONFIG + "\n" + line + "\n").problems
    assert len(problems) == 1 and problems[0].startswith(f"c.yaml:6: {message}")


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("lr_scale: 3", "lr_scale", 3.0),
        ("lr_scale: 1e-4", "lr_scale", 1e-4),
        ("lr_scale: '1e-4'", "lr_scale", 1e-4),
        ("seed: null", "seed", None),
        ("seed: None", "seed", None),
        ("shuffle: no", "shuffle", False),
        ("note: 5", "note", "5"),
        ("tags: []", "tags", []),
        (
            "optimizer: {_component_: torch.optim.SGD, lr: 1e-4}",
            "optimizer",
            {"_component_": "torch.optim.SGD", "lr": 1e-4},
        ),
    ],
)
def test_values_are_made_to_fit_their_types(load: Load, line: str, key: str, value: Any) -> None:
    loaded = load(yaml=CONFIG + line + "\n")
    assert loaded.problems == []
    assert loaded.values()[key] == value and type(loaded.values()[key]) is type(value)


def test_all_problems_are_told_at_once_each_with_its_place(folder: Path) -> None:
    (folder / "c.yaml").write_text(
        """\
modle: 1
batch_size: two
model:
  _component_: os.system
  command: !!python/name:os.system
  size: ${sizes}
batch_size: 3
dtype: fp23
"""
    )
    overrides = ["seed=x", "--shuffle", "optimizer=subprocess.run", "extra.a=${oc.decode:x}"]
    with pytest.raises(ConfigError) as caught:
        load_config(Path("recipe.py"), Path("c.yaml"), overrides)
    assert caught.value.exit_code == 2
    details = caught.value.details
    assert [each.split(": ")[0] for each in details[:8]] == [
        f"c.yaml:{line}" for line in (1, 2, 4, 5, 6, 7, 8)
    ] + ["override '--shuffle'"]
    for part in [
        "unknown key 'modle'; did you mean 'model'?",
        "batch_size: 'two' is not a whole number",
        "'os.system' is not allowed",
        "YAML tag",
        "key 'sizes' not found",
        "batch_size is given twice; the first is on line 2",
        "'fp23' is not one of",
        "override 'seed=x': seed: 'x' is not a whole number or null",
        "'subprocess.run' is not allowed",
        "only ${key}, ${oc.env:NAME} and ${asset:NAME} are filled in",
        "c.yaml: the key 'output_dir' is missing (str: the folder that everything is written to)",
    ]:
        assert [each for each in details if part in each], part
    assert len(details) == 12


def test_a_file_that_is_no_yaml_lacks_nothing_else(folder: Path) -> None:
    (folder / "c.yaml").write_text(CONFIG + "\tseed: 1\n")
    with pytest.raises(ConfigError, match=r"^c.yaml:\d+: not valid YAML: "):
        load_config(Path("recipe.py"), Path("c.yaml"))


def test_one_problem_is_one_line(folder: Path) -> None:
    (folder / "c.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError) as caught:
        load_config(Path("recipe.py"), Path("c.yaml"), ["seed=x"])
    assert str(caught.value) == "override 'seed=x': seed: 'x' is not a whole number or null"


def test_a_file_that_cannot_be_read_is_an_error(folder: Path) -> None:
    (folder / "c.yaml").write_bytes(b"a: \xff\n")
    for name, message in [
        ("c.yaml", "not UTF-8"),
        ("missing.yaml", "No such file"),
        (".", "Is a dir"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(Path("recipe.py"), Path(name), [])


def test_an_empty_file_is_a_problem(load: Load) -> None:
    assert load(yaml="").problems[0].startswith("c.yaml:1: the file is empty")


def test_references_follow_what_overrides_change(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWS", "8")
    yaml = (
        CONFIG
        + "note: ${output_dir}/log\nbatch_size: ${oc.env:ROWS}\n"
        + "extra: {n: '${model.size}', e: '\\${x}'}\n"
    )
    values = load("output_dir=/new", yaml=yaml).values()
    assert (values["note"], values["batch_size"]) == ("/new/log", 8)
    assert values["extra"] == {"x": {"y": 1}, "n": 3, "e": "${x}"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "note: ${outpt_dir}/x",
            "Interpolation key 'outpt_dir' not found; did you mean 'output_dir'?",
        ),
        ("note: ${oc.env:NO_SUCH}", "Environment variable 'NO_SUCH' not found"),
        ("note: ${oc.decode:x}", "only ${key}"),
        ("note: ${oc.${note}:x}", "only ${key}"),
        ("note: ${unclosed", "only ${key}"),
        ("batch_size: ${output_dir}", "could not be converted to Integer"),
        ("extra: {a: {b: '${nope}'}}", "extra.a.b: '${nope}': Interpolation key"),
    ],
)
def test_a_reference_that_leads_nowhere_has_its_line(load: Load, line: str, message: str) -> None:
    problems = load(yaml=CONFIG + line + "\n").problems
    assert len(problems) == 1 and problems[0].startswith("c.yaml:5: ") and message in problems[0]


def test_references_in_a_circle_or_without_end_are_bounded(load: Load) -> None:
    circle = CONFIG + "note: ${extra.a}\nextra: {a: '${note}'}\n"
    bomb = "".join(f"  k{i}: '${{extra.k{i + 1}}}${{extra.k{i + 1}}}'\n" for i in range(60))
    for yaml in (circle, CONFIG + "extra:\n" + bomb + "  k60: x\n"):
        problems = load(yaml=yaml).problems
        assert problems and all("expand without end" in each for each in problems)
        assert problems[-1].startswith("c.yaml:5: ")


def test_the_static_check_is_fast_and_imports_no_torch(folder: Path) -> None:
    (folder / "c.yaml").write_text(CONFIG)
    code = (
        "import sys, time; from pathlib import Path; from mytune.config import load_config;"
        "load_config(Path('recipe.py'), Path('c.yaml'), ['seed=3']).to_yaml();"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'my_parts'} & sys.modules.keys();"
        "print(sorted(heavy), time.process_time())"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)
    heavy, seconds = output.rsplit(maxsplit=1)
    assert heavy == "[]"
    assert float(seconds) < 0.5  # 0.2 s on a quiet machine; `tests/benchmarks` measures it
