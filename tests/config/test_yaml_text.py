"""YAML is read strictly, with lines, and written so that it reads back the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mytune.config.yaml_text import MAX_NODES, read_value, read_yaml, write_yaml

ODD = [
    "1e-4",
    "00005",
    "12:30",
    "None",
    "null",
    "yes",
    "~",
    "",
    " a",
    "a: b",
    "a #b",
    "- a",
    "[x",
    "{",
    "&a",
    "*a",
    "!!int 3",
    "0x10",
    "1_000",
    "2020-01-01",
    "a\nb",
    "é",
    "${a}/b",
    "'",
    '"',
    "<<",
    "=",
    ".inf",
    "3.",
    "%x",
    "@x",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x1f", 31),
        (".5", 0.5),
        ("0", 0),
        ("00005", "00005"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("True", True),
        ("no", False),
        ("null", None),
        ("None", None),
        ("[q_proj, 1, None]", ["q_proj", 1, None]),
        ("{a: {b: 1e-3}}", {"a": {"b": 1e-3}}),
        ('"5"', "5"),
        ("''", ""),
        ("a: b", "a: b"),
        ("a #b", "a #b"),
        ('"a" b', '"a" b'),
        ("!!python/name:os.system", "!!python/name:os.system"),
        ("a=b", "a=b"),
        ("Hello, my name is", "Hello, my name is"),
        ("<<", "<<"),
    ],
)
def test_an_overrides_value_means_what_it_looks_like(text: str, value: Any) -> None:
    found = read_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["[1, 2", "{a: 1, a: 2}", "[!!python/name:os.system x]", "[1] 2", "{a}: 3"]
)
def test_a_malformed_list_or_mapping_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a YAML list or mapping"):
        read_value(text)


def test_a_key_of_a_flow_mapping_needs_a_space_after_its_colon() -> None:
    assert read_yaml("a: {b:c, 'd:e', f:g: '', h: 1}").problems == [
        (1, "'b:c' lacks a space after its colon")
    ]


def test_what_is_written_reads_back_the_same() -> None:
    values = {
        "text": ODD,
        "deep": {"a": [{"b": None, "c": [1, 2.5, True]}, []], "d": {}},
        "numbers": [1e-5, 1e300, float("inf"), -1, 0.1],
        **{f"k{i}": text for i, text in enumerate(ODD)},
    }
    assert read_yaml(write_yaml(values)).values == values


def test_every_key_has_its_line() -> None:
    document = read_yaml("a: 1\n\nb:\n  c:\n    - x: 1\n    - {y: 2,\n       z: 3}\n")
    assert document.lines == {
        ("a",): 1,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", "0", "x"): 5,
        ("b", "c", "1", "y"): 6,
        ("b", "c", "1", "z"): 7,
    }


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a is given twice; the first is on line 1"),
        ("a:\n  b: 1\n  b: 2\n", 3, "a.b is given twice; the first is on line 2"),
        ("a: 1\nb: !!python/object/apply:os.mkdir [ran]\n", 2, "YAML tag"),
        ("a: 1\nb: !!str 5\n", 2, "YAML tag 'tag:yaml.org,2002:str'"),
        ("a: !x {b: 1}\n", 1, "YAML tag '!x'"),
        ("", 1, "the file is empty"),
        ("# only a comment\n", 1, "the file is empty"),
        ("- a\n", 1, "a config is a mapping"),
        ("a: 1\nb: [1\n", 3, "not valid YAML"),
        ("a: 1\n  b: 2\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("a: \x07\n", 1, "not valid YAML"),
        ("a: 1\n7: 2\n", 2, "the key '7' is not text"),
        ("a: 1\non: 2\n", 2, "the key 'on' is not text"),
        ("a: 1\n? [x, y]\n: 2\n", 2, "is not text"),
        ("a: &x\n  b: *x\n", 1, "an alias contains itself"),
        ("a: 1\nb: " + "9" * 5000, 2, "not a number that can be used"),
    ],
)
def test_what_is_wrong_has_a_line(text: str, line: int, message: str) -> None:
    problems = read_yaml(text).problems
    assert [n for n, _ in problems] == [line]
    assert message in problems[0][1]


def test_what_is_nested_too_deeply_is_refused() -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # compiling, in a test before this one, raises it
    try:
        assert "nested too deeply" in read_yaml("a: " + "[" * 400).problems[0][1]
    finally:
        sys.setrecursionlimit(limit)


def test_tags_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read_yaml(
        "a: !!python/object/apply:os.mkdir [ran]\nb: !!python/object/new:os.mkdir {args: [ran]}\n"
    )
    assert not (tmp_path / "ran").exists()


def test_alias_bombs_are_bounded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert f"more than {MAX_NODES}" in read_yaml("\n".join(lines)).problems[0][1]


def test_anchors_and_merge_keys_work() -> None:
    text = "base: &base {a: 1, b: 2}\nx:\n  <<: *base\n  b: 3\ny: *base\n"
    document = read_yaml(text)
    assert document.problems == []
    assert document.values == {
        "base": {"a": 1, "b": 2},
        "x": {"a": 1, "b": 3},
        "y": {"a": 1, "b": 2},
    }
