"""A recipe's schema is read from its source, and nothing in it runs."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Literal

import pytest

from mytune.config import component
from mytune.config.schema import read_schema
from mytune.errors import ConfigError


def test_fields_have_types_defaults_comments_and_sections(folder: Path) -> None:
    schema = read_schema(folder / "recipe.py")
    names = schema.names
    assert [each.name for each in schema.fields if each.required] == ["output_dir", "model"]
    assert names["seed"].type == "int | None" and names["seed"].optional
    assert names["dtype"].hint == Literal["bf16", "fp32"] and not names["dtype"].optional
    assert names["extra"].hint == dict[str, Any]
    assert names["dataset"].default == {
        "_component_": "my_parts.rows",
        "source": "a",
        "packed": False,
    }
    assert names["tags"].default == ["a", "b"]
    assert names["model"].comment == "what is trained;\na builder"
    assert names["optimizer"].comment == "the optimizer"
    assert [
        names[each].section for each in ("output_dir", "seed", "model", "dataset", "batch_size")
    ] == [
        "Where things go",
        "",
        "The parts",
        "",
        "The loop",
    ]


def test_the_schema_agrees_with_the_dataclass_that_python_makes(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("recipe", folder / "recipe.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.Config(output_dir="out", model=component("x.y"))
    schema = read_schema(folder / "recipe.py")
    assert [each.name for each in dataclasses.fields(config)] == list(schema.names)
    for field in schema.fields:
        if not field.required:
            assert getattr(config, field.name) == field.default


@pytest.mark.parametrize(
    "default",
    [
        "__import__('os').mkdir('ran')",
        "component(__import__('os').mkdir('ran'))",
        "component('x.y', a=open('ran', 'w'))",
        "field(default_factory=lambda: __import__('os').mkdir('ran'))",
        "[__import__('os').mkdir('ran')]",
        'f\'{__import__("os").mkdir("ran")}\'',
    ],
)
def test_a_default_that_is_code_is_refused_and_not_run(folder: Path, default: str) -> None:
    recipe = folder / "evil.py"
    recipe.write_text(f"open('ran', 'w')\nclass Config:\n    a: int = 1\n    b: str = {default}\n")
    with pytest.raises(ConfigError) as caught:
        read_schema(recipe)
    assert f"{recipe}:4: b: a default is a literal" in str(caught.value)
    assert not (folder / "ran").exists()


def test_all_that_is_wrong_with_a_recipe_is_told_at_once(folder: Path) -> None:
    recipe = folder / "bad.py"
    recipe.write_text("class Config:\n    a: Path\n    b: int = f()\n    c: str | list[int] = 1\n")
    with pytest.raises(ConfigError) as caught:
        read_schema(recipe)
    assert [each.split(": ")[0] for each in caught.value.details] == [
        f"{recipe}:{n}" for n in (2, 3, 4)
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", ":1: not a Python file"),
        ("x = 1\n", "no `class Config`"),
        ("a\0b", "not a Python file"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(folder: Path, source: str, message: str) -> None:
    (folder / "no.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        read_schema(folder / "no.py")
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.py"):
        read_schema(folder / "missing.py")
