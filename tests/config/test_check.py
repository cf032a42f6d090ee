"""The check of components: arguments, types, missing files, without running local code."""

from __future__ import annotations

from pathlib import Path

import pytest

from mytune.config import check_components
from mytune.errors import MissingTokenizer
from mytune.tokenizers.files import find_tokenizer
from tests.config.conftest import CONFIG, RECIPE, Load

SUPPLIED = """
SUPPLIED = {
    "optimizer": ["params"],
    "lr_scheduler": ["optimizer", "num_training_steps"],
    "dataset": ["source"],
}
"""


@pytest.fixture
def recipe(folder: Path) -> None:
    (folder / "recipe.py").write_text(RECIPE + SUPPLIED)


def test_a_right_config_has_no_problems(recipe: None, load: Load) -> None:
    yaml = CONFIG + "lr_scheduler: {_component_: my_schedules.cosine, warmup: 3}\n"
    Path("my_schedules.py").write_text("def cosine(optimizer, warmup, num_training_steps): pass\n")
    assert check_components(load("~dataset.source", yaml=yaml)) == []


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("model.sizes=3", "model.sizes", "model takes no argument 'sizes'; did you mean 'size'?"),
        ("model.size=big", "model.size", "'big' is not a whole number"),
        ("model.path=3", "model.path", "3 is not str | None"),
        ("~model.size", "model._component_", "model needs the argument 'size'"),
        (
            "model=my_parts.modl",
            "model._component_",
            "unknown component 'my_parts.modl'; did you mean 'model'?",
        ),
        (
            "model.inner={_component_: my_parts.Box}",
            "model.inner._component_",
            "Box needs the argument 'side'",
        ),
        (
            "model.inner=[{_component_: my_parts.Box, side: x}]",
            "model.inner.0.side",
            "'x' is not a number",
        ),
        (
            "model=mytune.training.StdoutLogger",
            "model._component_",
            "mytune.training.StdoutLogger is of another kind than what goes here, such as mytune.m",
        ),
        ("optimizer.lr=fast", "optimizer.lr", "'fast' is not a number"),
        ("optimizer.betas=[0.9,x]", "optimizer.betas", "[0.9, 'x'] is not list[float, float]"),
        ("model.size=10000000000000000000", "model.size", "is not a whole number"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "[0.9] is not list[float, float]"),
        (
            "model={_component_: mytune.models.llama3.lora_llama3_8b, lora_modules: q_proj}",
            "model.lora_modules",
            "'q_proj' is not a list of texts; write [q_proj]",
        ),
        (
            "optimizer={_component_: torchao.optim.AdamW8bit, lr: fast}",
            "optimizer.lr",
            "'fast' is not a number",
        ),
        ("optimizer.lrr=3", "optimizer.lrr", "AdamW takes no argument 'lrr'; did you mean 'lr'?"),
        ("optimizer=torch.optim.AdmW", "optimizer._component_", "did you mean 'AdamW'?"),
        ("optimizer.params=[]", "optimizer.params", "the recipe itself gives AdamW this argument"),
        ("optimizer=my_parts.Box", "optimizer._component_", ""),
        (
            "lr_scheduler=my_parts.Box",
            "lr_scheduler._component_",
            "does not take 'num_training_steps', which the recipe gives",
        ),
    ],
)
def test_a_wrong_component_has_its_place(
    recipe: None, load: Load, override: str, key: str, message: str
) -> None:
    loaded = load("~dataset.source", override)
    assert loaded.problems == []
    problems = check_components(loaded)
    if not message:  # the recipe's first argument goes by position, whatever it is called
        assert problems == []
        return
    place = "c.yaml:3" if override.startswith("~model") else f"override '{override}'"
    assert len(problems) == 1
    assert problems[0].startswith(f"{place}: {key}: ") and message in problems[0]


def test_without_the_table_nothing_of_the_recipe_counts_as_missing(load: Load) -> None:
    assert check_components(load()) == []
    assert check_components(load("~model.size")) == []


def test_static_and_component_problems_add_up(recipe: None, load: Load) -> None:
    loaded = load("seed=x", "model.sizes=1", "model.size=${nope}", "~dataset.source")
    assert len(loaded.problems) == 2
    assert len(check_components(loaded)) == 1


def test_local_code_is_read_and_not_run(recipe: None, load: Load) -> None:
    Path("my_evil.py").write_text(
        "open('ran', 'w')\ndef f(a): pass\ng = f\n@g\ndef h(): pass\nclass C(f): pass\n"
    )
    loaded = load("model=my_evil.f", "model.b=1", "~dataset.source")
    assert ["takes no argument 'b'" in each for each in check_components(loaded)] == [True, False]
    for name in ("g", "h", "C"):  # what they take is known only when they run
        assert check_components(load(f"model=my_evil.{name}", "model.b=1", "~dataset.source")) == []
    assert not Path("ran").exists()


def test_missing_files_of_our_components_are_told(
    recipe: None, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = CONFIG.replace(
        "size: 3",
        "size: 3\n  inner:\n    _component_: mytune.models.llama3.llama3_tokenizer\n"
        "    path: no/tokenizer.model",
    )
    loaded = load("~dataset.source", yaml=yaml)
    problems = check_components(loaded)
    assert len(problems) == 1
    assert problems[0].startswith("c.yaml:7: model.inner.path: 'no/tokenizer.model' does not exist")
    assert check_components(loaded, files=False) == []
    Path("no").mkdir()
    Path("no/tokeniser.model").touch()
    assert check_components(loaded)[0].endswith("; did you mean 'tokeniser.model'?")
    Path("no/epoch_0").mkdir()
    Path("no/epoch_0/tokenizer.model").touch()
    assert check_components(loaded)[0].endswith("; did you mean 'no/epoch_0/tokenizer.model'?")
    Path("no/tokenizer.model").touch()
    assert check_components(loaded) == []
    monkeypatch.setenv("HOME", str(Path.cwd()))
    loaded = load("~dataset.source", yaml=yaml.replace("no/tokenizer", "~/no/tokenizer"))
    assert check_components(loaded) == []


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("source: null", "None is not str | list[str]"),
        ("source: [1]", "[1] is not str | list[str]"),
        ("column_map: [input]", "['input'] is not dict[str, str] | None"),
        ("column_map: {input: 1}", "{'input': 1} is not dict[str, str] | None"),
        ("filter_fn: short", "'short' is not a component (_component_: ...) | None"),
        ("column_map: {input: a, output: b}", None),
        ("filter_fn: {_component_: mytune.datasets.AlpacaToMessages}", None),
    ],
)
def test_arguments_of_our_components_have_their_types(load: Load, argument: str, told: str) -> None:
    source = "" if argument.startswith("source") else "source: json, "
    dataset = f"{{_component_: mytune.datasets.instruct_dataset, {source}{argument}}}"
    problems = check_components(load(yaml=f"{CONFIG}dataset: {dataset}\n"), files=False)
    assert [each.partition(": dataset.")[2].partition(": ")[2] for each in problems] == (
        [told] if told else []
    )


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ("source: no.jsonl", 1),
        ("source: here.jsonl", 0),
        ("source: '*.jsonl'", 0),
        ("source: someone/dataset", 0),
        ("source: json, data_files: no.json", 1),
        ("source: json, data_files: [here.jsonl, no.json]", 1),
        ("source: someone/dataset, data_files: no.json", 0),
        ("source: 'https://host/no.json'", 0),
        ("source: ~/no.jsonl", 1),
        ("source: ~/here.jsonl", 0),
    ],
)
def test_missing_data_files_are_told(
    load: Load, arguments: str, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("here.jsonl").touch()
    dataset = f"dataset: {{_component_: mytune.datasets.instruct_dataset, {arguments}}}\n"
    problems = check_components(load(yaml=CONFIG + dataset))
    where = "" if "~" in arguments else f" in {Path.cwd()}"
    told = [each.partition("; did you mean")[0] for each in problems]
    assert [each.endswith(f"does not exist{where}") for each in told] == [True] * missing


def test_of_a_missing_data_file_the_nearest_is_told(load: Load) -> None:
    Path("train.jsonl").touch()
    dataset = "dataset: {_component_: mytune.datasets.instruct_dataset, source: trian.jsonl}\n"
    (problem,) = check_components(load(yaml=CONFIG + dataset))
    assert problem.endswith("; did you mean 'train.jsonl'?")


def test_an_adapter_in_the_place_of_a_model_is_told_with_its_base(load: Load) -> None:
    for folder in ("base", "tuned"):
        Path(folder).mkdir()
    Path("tuned/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    part = "_component_: mytune.models.llama3.llama3_tokenizer\n    path: tuned/tokenizer.model"
    yaml = CONFIG.replace("size: 3", f"size: 3\n  inner:\n    {part}")
    loaded = load("~dataset.source", yaml=yaml)
    (problem,) = check_components(loaded)
    keys = "checkpointer.checkpoint_dir=base checkpointer.adapter_checkpoint=tuned"
    assert problem.endswith(f"; tuned is an adapter: {keys}")
    Path("tuned/adapter").mkdir()  # as runs save it
    Path("tuned/adapter_config.json").rename("tuned/adapter/adapter_config.json")
    (problem,) = check_components(loaded)
    assert problem.endswith(f"; tuned/adapter is an adapter: {keys}/adapter")
    for model in ("config.json", "params.json"):  # it is a whole model as well
        Path("tuned", model).touch()
        assert "is an adapter" not in check_components(loaded)[0]
        Path("tuned", model).unlink()


@pytest.mark.parametrize("part", ["adapter_config.json", "adapter/adapter_config.json"])
def test_a_folder_of_an_adapter_in_the_place_of_a_tokenizer_is_told(
    tmp_path: Path, part: str
) -> None:
    (tmp_path / part).parent.mkdir(exist_ok=True)
    (tmp_path / part).touch()
    with pytest.raises(MissingTokenizer, match=r"holds an adapter and no model: its base is check"):
        find_tokenizer(tmp_path)
