"""Overrides: what each form does, and what a wrong one says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.conftest import CONFIG, Load


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("batch_size=4", "batch_size", 4),
        ("lr_scale=1e-4", "lr_scale", 1e-4),
        ("lr_scale=2", "lr_scale", 2.0),
        ("seed=null", "seed", None),
        ("seed=None", "seed", None),
        ("shuffle=False", "shuffle", False),
        ("tags=[x, y]", "tags", ["x", "y"]),
        ("tags.1=z", "tags", ["a", "z"]),
        ("note=a=b: [c", "note", "a=b: [c"),
        ("note=00005", "note", "00005"),
        ("note=1e-4", "note", "1e-4"),
        ("note=yes", "note", "yes"),
        ("note=null", "note", None),
        ("note='null'", "note", "null"),
        ('note=""', "note", ""),
        ("note=https://a/?q=1&r=2#x", "note", "https://a/?q=1&r=2#x"),
        ("extra.x.z.w=1", "extra", {"x": {"y": 1, "z": {"w": 1}}}),
        ("extra={q: 2}", "extra", {"x": {"y": 1}, "q": 2}),
        ("extra.f=1e-4", "extra", {"x": {"y": 1}, "f": 1e-4}),
        ("extra.f=00005", "extra", {"x": {"y": 1}, "f": "00005"}),
        ("~extra.x.y", "extra", {"x": {}}),
        (
            "optimizer.lr=1",
            "optimizer",
            {"_component_": "torch.optim.AdamW", "lr": 1, "fused": True},
        ),
        ("~optimizer.fused", "optimizer", {"_component_": "torch.optim.AdamW", "lr": 2e-5}),
        (
            "lr_scheduler=torch.optim.lr_scheduler.StepLR",
            "lr_scheduler",
            {"_component_": "torch.optim.lr_scheduler.StepLR"},
        ),
        (
            "dataset=[{_component_: my_parts.rows, source: b}]",
            "dataset",
            [{"_component_": "my_parts.rows", "source": "b"}],
        ),
        ("~shuffle", "shuffle", True),
    ],
)
def test_a_value_is_set(load: Load, override: str, key: str, value: Any) -> None:
    loaded = load(override)
    assert loaded.problems == []
    found = loaded.values()[key]
    assert found == value and type(found) is type(value)


def test_a_removed_optional_key_is_null_and_another_its_default(load: Load) -> None:
    yaml = CONFIG + "seed: 3\nlr_scheduler: {_component_: my_parts.model}\nbatch_size: 7\n"
    values = load("~seed", "~lr_scheduler", "~batch_size", yaml=yaml).values()
    assert (values["seed"], values["lr_scheduler"], values["batch_size"]) == (None, None, 2)


def test_a_component_swap_keeps_only_what_the_command_line_gives(load: Load) -> None:
    loaded = load("optimizer.momentum=0.9", "optimizer=torch.optim.SGD")
    assert loaded.values()["optimizer"] == {"_component_": "torch.optim.SGD", "momentum": 0.9}
    assert [each for each in loaded.notices if "dropped fused, lr of the component before" in each]


def test_a_swap_to_the_same_component_keeps_its_arguments(load: Load) -> None:
    assert load("optimizer=torch.optim.AdamW").values()["optimizer"]["lr"] == 2e-5


def test_a_new_name_alone_keeps_the_arguments(load: Load) -> None:
    optimizer = load("optimizer._component_=torch.optim.SGD").values()["optimizer"]
    assert optimizer == {"_component_": "torch.optim.SGD", "lr": 2e-5, "fused": True}


def test_a_component_is_swapped_at_any_depth(load: Load) -> None:
    yaml = (
        CONFIG
        + "  inner:\n    _component_: my_parts.Box\n    side: 1\n"
        + "    lid: {_component_: my_parts.Box, side: 2}\n"
    )
    loaded = load("model.inner.lid=my_parts.model", "model.inner.lid.size=4", yaml=yaml)
    assert loaded.values()["model"]["inner"] == {
        "_component_": "my_parts.Box",
        "side": 1,
        "lid": {"_component_": "my_parts.model", "size": 4},
    }
    loaded = load("model.inner.lid=my_parts.Box", "model.inner=my_parts.model", yaml=yaml)
    assert loaded.values()["model"]["inner"] == {
        "_component_": "my_parts.model",
        "lid": {"_component_": "my_parts.Box"},
    }


def test_an_element_of_a_list_of_components_is_changed_by_its_index(load: Load) -> None:
    yaml = (
        CONFIG
        + "dataset:\n"
        + "  - {_component_: my_parts.rows, source: a}\n"
        + "  - {_component_: my_parts.rows, source: b}\n"
    )
    loaded = load("dataset.1.source=c", "dataset.0=my_parts.model", "dataset.0.size=1", yaml=yaml)
    assert loaded.values()["dataset"] == [
        {"_component_": "my_parts.model", "size": 1},
        {"_component_": "my_parts.rows", "source": "c"},
    ]
    problems = load("dataset.2.source=c", yaml=yaml).problems
    assert problems == ["override 'dataset.2.source=c': '2' is no index of a list of 2"]


def test_the_last_of_two_overrides_wins(load: Load) -> None:
    assert load("batch_size=3", "batch_size=4").values()["batch_size"] == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--seed=3", "write key=value or ~key; did you mean 'seed'?"),
        ("+seed=3", "write key=value or ~key; did you mean 'seed'?"),
        ("seed", "write seed=VALUE, without spaces"),
        ("5", "write key=value or ~key, without spaces"),
        ("seed=", "no value; write seed=null for none"),
        ("=3", "write key=value or ~key"),
        ("a..b=3", "write key=value or ~key"),
        ("extra=[1, 2", "[1, 2 does not end: leave out its spaces, or quote it all"),
        ("extra={a:b,c:d}", "'a:b' lacks a space after its colon; then all of it needs quotes"),
        ("tags=x,y", "'x,y' is not a list of texts; write [x,y]"),
        ("~seed=3", "takes no value; to set it write seed=3"),
        ("~model", "model is required; to change it write model=..."),
        ("~optimizer._component_", "to remove it all write ~optimizer"),
        ("~optimizer.fusd", "there is no such key; did you mean 'fused'?"),
        ("~sed", "there is no such key; did you mean 'seed'?"),
        ("~seed.x", "seed has no keys"),
        ("sed=3", "unknown key 'sed'; did you mean 'seed'?"),
        ("modle.size=3", "unknown key 'modle'; did you mean 'model'?"),
        ("seed=x", "seed: 'x' is not a whole number or null"),
        ("seed.x=1", "seed: {'x': 1} is not a whole number or null"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_right(
    load: Load, override: str, message: str
) -> None:
    problems = load(override).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"override '{override}': ") and message in problems[0]


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("note=Once upon a time", "it in quotes: 'note=Once upon a time'"),
        ("note= a = b", "it in quotes: 'note=a = b'"),
        ("tags=[x, y]", "it in quotes: 'tags=[x, y]'"),
        ("optimizer.lr = 1e-4", "optimizer.lr=1e-4, without spaces around ="),
        ("batch_size= 3", "batch_size=3, without spaces around ="),
        ("batch_size =3", "batch_size=3, without spaces around ="),
    ],
)
def test_an_override_that_the_shell_tore_at_its_spaces_is_one_problem(
    load: Load, words: str, right: str
) -> None:
    problems = load("shuffle=false", *words.split(), "seed=3").problems
    assert problems == [f"override '{words}': write {right}"]


def test_a_key_after_an_override_is_no_part_of_it(load: Load) -> None:
    problems = load("note=a", "seed", "batch_size=3").problems
    assert len(problems) == 1 and problems[0].startswith("override 'seed': write seed=VALUE")


def test_where_says_who_set_a_key(load: Load) -> None:
    loaded = load("optimizer.lr=1", "batch_size=3")
    assert loaded.where("batch_size") == "override 'batch_size=3'"
    assert loaded.where("optimizer.lr") == "override 'optimizer.lr=1'"
    assert loaded.where("model.size") == "c.yaml:4"
    assert loaded.where("shuffle") == "default of recipe recipe.py"
    assert load("optimizer.lr.x=1").where("optimizer.lr") == "override 'optimizer.lr.x=1'"
