"""Rows come out of every kind of file, in order, with their place; what cannot be read is named."""

from __future__ import annotations

import csv
import inspect
import json
from pathlib import Path

import pytest

from mytune.datasets import (
    alpaca_cleaned_dataset,
    alpaca_dataset,
    sources,
    text_completion_dataset,
    wikitext_dataset,
)
from mytune.datasets.sources import open_source
from mytune.errors import ConfigError, DataError, UnreachableError

ROWS = [{"input": f"q{i}, “{i}”\n", "output": "a" * i} for i in range(1, 21)]


def write_json(file):
    file.write_text(json.dumps(ROWS, indent=1))


def write_jsonl(file):
    file.write_text("\n".join(json.dumps(row) for row in ROWS))


def write_csv(file):
    with open(file, "w", newline="", encoding="utf-8-sig") as out:
        writer = csv.DictWriter(out, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(file):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=7)


def values(*args, **kwargs):
    return [row.values for row in open_source(*args, **kwargs).read()]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", write_json),
        ("rows.jsonl", write_jsonl),
        ("lines.json", write_jsonl),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
    ],
)
def test_every_file_format_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    rows = list(open_source(str(tmp_path / name)).read())
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{tmp_path / name}:{i}" for i in range(1, 21)]


def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch):
    write_json(tmp_path / "rows.json")
    for size in (13, 64, 1000):
        monkeypatch.setattr(sources, "_CHUNK", size)
        assert values(str(tmp_path / "rows.json")) == ROWS


def test_what_follows_an_array_is_not_lost_silently(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a"}] {"text": "b"}')
    with pytest.raises(DataError, match="after the array follows"):
        values(str(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", [(1, "one"), (2, "two "), (5, "three")]),
        ("paragraph", [(1, "one\ntwo "), (5, "three")]),
        ("document", [(1, "one\ntwo \n\n\nthree")]),
    ],
)
def test_text_is_rows_by_line_paragraph_or_file(tmp_path, sample_by, expected):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo \n\n\nthree")
    rows = list(open_source(str(file), sample_by=sample_by).read())
    assert [(row.where, row.values) for row in rows] == [
        (f"{file}:{number}", {"text": text}) for number, text in expected
    ]


@pytest.fixture
def folder(tmp_path):
    """Files of one row each, whose text is the file's name."""
    hidden = (".hidden.jsonl", ".ipynb_checkpoints/b-checkpoint.jsonl")
    for name in ("b.jsonl", "sub/a.jsonl", "test.jsonl", "README.md", *hidden):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}))
    return tmp_path / "data"


def names(*args, **kwargs):
    return [value["text"] for value in values(*args, **kwargs)]


def test_files_folders_globs_and_lists_are_sources(folder):
    assert names(str(folder)) == ["b.jsonl", "sub/a.jsonl"]
    assert names(str(folder / "*.jsonl")) == ["b.jsonl", "test.jsonl"]
    assert names(str(folder.parent / "*" / "b.jsonl")) == ["b.jsonl"]
    assert names(str(folder / "**" / "*.jsonl")) == ["b.jsonl", "sub/a.jsonl", "test.jsonl"]
    assert names([str(folder / "test.jsonl"), str(folder / "sub")]) == ["test.jsonl", "sub/a.jsonl"]
    assert names(str(folder), data_files="sub/*.jsonl") == ["sub/a.jsonl"]


def test_torchtunes_form_names_a_format_and_its_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names("json", data_files="b.jsonl") == ["b.jsonl"]
    assert names("json", data_files="README.md") == ["README.md"]  # the format is said, not guessed
    files = {"train": ["b.jsonl", "sub/a.jsonl"], "test": "test.jsonl"}
    assert names("json", data_files=files) == ["b.jsonl", "sub/a.jsonl"]
    assert names("json", data_files=files, split="test") == ["test.jsonl"]
    assert names("json", data_dir=str(folder / "sub")) == ["sub/a.jsonl"]


def test_a_split_of_a_folder_is_the_files_that_are_named_so(folder):
    assert names(str(folder), split="test") == ["test.jsonl"]
    (folder / "train-00000-of-00001.jsonl").write_text('{"text": "train"}')
    assert names(str(folder), split="train") == ["train"]
    with pytest.raises(ConfigError, match="split is 'validation'"):
        values(str(folder), split="validation")


def test_what_is_named_for_another_split_is_not_trained(tmp_path):
    for name in ("part1", "part2", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert names(str(tmp_path), split="train") == ["part1", "part2"]
    assert names(str(tmp_path), split="validation") == ["dev"]
    for name in ("part1", "part2"):
        (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(ConfigError, match="split is 'train'"):
        values(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", slice(3)),
        ("train[3:5]", slice(3, 5)),
        ("train[18:]", slice(18, None)),
        ("train[-2:]", slice(-2, None)),
        ("train[10%:25%]", slice(2, 5)),
        ("train[:-90%]", slice(2)),
    ],
)
def test_a_split_takes_a_part_of_the_rows(tmp_path, split, expected):
    write_jsonl(tmp_path / "rows.jsonl")
    assert values(str(tmp_path / "rows.jsonl"), split=split) == ROWS[expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "data/tset.jsonl"}, r"no data file .*did you mean 'test.jsonl'\?"),
        ({"source": "data/empty"}, r"the folder has no \.json"),
        ({"source": "./data/nothing*"}, "no data file data/nothing"),
        ({"source": ["data/README.md"]}, r"by '\.md'; known are \.json, \.jsonl, \.csv"),
        ({"source": "json"}, "needs data_files"),
        ({"source": "data", "split": "train[:1k]"}, r"train\[:1000\]"),
        ({"source": "data/b.jsonl", "split": "test"}, "split is 'test'"),
        ({"source": "json", "data_files": {"train": "x"}, "split": "test"}, "has train"),
        ({"source": "data", "sample_by": "word"}, "line, paragraph, document"),
    ],
)
def test_a_wrong_source_says_what_would_be_right(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder.parent)
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        open_source(**arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"},\n{"text": "y",}]', r"a\.json:2: not JSON: .*, line 2 of"),
        ("a.json", b'[{"text": "x"}, {"te', r"a\.json:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text: "y"}\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl:2: the row is a list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8.*at byte 11"),
        ("a.csv", b"text,b\nx,1\ny,2,3\n", r"a\.csv:2: the row has more fields"),
        ("a.csv", b'text,b\nx,1\n"y\n', r"a\.csv:2: unexpected end of data"),
        ("a.txt", b"x\n\xff\n", r"a\.txt:1: .*utf-8"),
        ("a.parquet", b"PAR1?", r"a\.parquet:1: "),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: "),
        ("a.jsonl", b"\n \n", "the dataset has no rows"),
        ("a.jsonl", b'{"txt": "x"}\n', r"a\.jsonl:1: no column 'text'; the row has txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_row(
    tokenizer, tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        text_completion_dataset(tokenizer, str(tmp_path / name))


def test_a_csv_field_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000)
    assert values(str(tmp_path / "a.csv")) == [{"text": "x" * 200_000}]


def test_a_hub_data_set_is_loaded_with_its_options(monkeypatch, tokenizer):
    import datasets

    asked = {}

    def load_dataset(path, **options):
        asked.update(path=path, **options)
        return datasets.Dataset.from_list([{"page": "one"}, {"page": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ds = wikitext_dataset(tokenizer, split="train[:2]", revision="main")
    assert asked == {
        "path": "EleutherAI/wikitext_document_level",
        "split": "train[:2]",
        "name": "wikitext-103-v1",
        "revision": "main",
    }
    assert [len(sample["tokens"]) for sample in ds] == [5, 5]
    with pytest.raises(
        DataError, match=r"wikitext_document_level \(train\):1: no column 'nothing'"
    ):
        wikitext_dataset(tokenizer, column="nothing")


@pytest.mark.parametrize(
    ("why", "kind"),
    [(ConnectionError("no route"), UnreachableError), (FileNotFoundError("none"), DataError)],
)
def test_a_hub_data_set_that_cannot_be_had_is_one_clear_error(tokenizer, monkeypatch, why, kind):
    def load_dataset(path, **options):
        raise why

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(kind) as error:
        alpaca_dataset(tokenizer, source="nobody/nothing-of-the-kind")
    assert str(error.value).startswith("'nobody/nothing-of-the-kind' is no local file or folder")
    assert "HF_HUB_OFFLINE" in str(error.value) and "\n" not in str(error.value)


def test_builders_show_every_option_so_that_a_misspelt_one_is_found():
    for builder in (alpaca_dataset, alpaca_cleaned_dataset, text_completion_dataset):
        parameters = inspect.signature(builder).parameters
        assert {"source", "packed", "split", "data_files", "on_bad_row", "name"} <= set(parameters)
        assert all(p.kind != p.VAR_KEYWORD for p in parameters.values())


def test_reading_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, mytune.datasets.builders; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
