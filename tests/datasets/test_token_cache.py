"""Tokens are made once, kept on disk, and made again when anything that they depend on changes."""

from __future__ import annotations

import errno
import json
import logging
import mmap
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mytune.assets import ASSETS
from mytune.datasets import (
    InputOutputToMessages,
    Message,
    Stats,
    alpaca_dataset,
    chat_dataset,
    instruct_dataset,
    sft_dataset,
    text_completion_dataset,
    tokens,
)
from mytune.datasets.cache import load_or_write
from mytune.datasets.sources import Row
from mytune.datasets.tokens import write_tokens
from mytune.errors import ConfigError, DataError, ResourceError, TuneError
from mytune.models.llama3 import llama3_tokenizer
from tests.datasets.fake import CharTokenizer, text

ROWS = [{"input": f"q{i}", "output": "a" * i} for i in range(1, 8)]


def samples(ds):
    return [(sample["tokens"].tolist(), sample["labels"].tolist()) for sample in ds]


def test_a_second_run_maps_the_same_arrays_and_tokenizes_nothing(tokenizer, write_rows, cache):
    file = write_rows(ROWS)
    first = instruct_dataset(tokenizer, source=file)
    calls, times = tokenizer.calls, {f: f.stat().st_mtime_ns for f in cache.rglob("*")}
    second = instruct_dataset(tokenizer, source=file)
    assert tokenizer.calls == calls == len(ROWS)
    assert {f: f.stat().st_mtime_ns for f in cache.rglob("*")} == times
    assert samples(second) == samples(first)
    assert (second.stats, second.fingerprint) == (first.stats, first.fingerprint)
    assert isinstance(second._tokens.base.base, mmap.mmap)  # mapped, not loaded


def test_tokens_of_code_that_may_change_are_not_kept(write_rows, cache):
    tokenizer = CharTokenizer(fingerprint=None)
    instruct_dataset(tokenizer, source=write_rows(ROWS))
    assert not list(cache.glob("*"))


def test_the_same_rows_elsewhere_are_the_same_dataset(tokenizer, write_rows):
    first = instruct_dataset(tokenizer, source=write_rows(ROWS))
    calls = tokenizer.calls
    second = instruct_dataset(tokenizer, source=write_rows(ROWS, "moved.jsonl"))
    assert tokenizer.calls == calls and second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [*ROWS[:-1], {"input": "q7", "output": "other"}]},
        {"tokenizer": CharTokenizer(fingerprint="others")},
        {"train_on_input": True},
        {"new_system_prompt": "Be brief."},
        {"mask_history": True},
        {"column_map": {"system": "input"}},
        {"column_map": {"input": "output"}},
        {"max_seq_len": 7},
        {"split": "train[:3]"},
        {"on_bad_row": "skip"},
    ],
)
def test_whatever_tokens_depend_on_makes_them_anew(tokenizer, write_rows, cache, change):
    instruct_dataset(tokenizer, source=write_rows(ROWS))
    arguments = {"tokenizer": tokenizer, "source": write_rows(change.pop("rows", ROWS)), **change}
    changed = instruct_dataset(**arguments)
    assert len([each for each in cache.iterdir() if each.is_dir()]) == 2
    assert samples(changed) == samples(instruct_dataset(**arguments, filter_fn=lambda row: True))


def test_another_format_makes_tokens_anew(tokenizer, write_rows):
    rows = [{"instruction": "i", "input": "q", "output": "a"}]
    file = write_rows(rows)
    assert samples(instruct_dataset(tokenizer, source=file)) != samples(
        alpaca_dataset(tokenizer, source=file)
    )


def shorten(file):
    file.write_bytes(file.read_bytes()[:-8])


def lose_pages(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens", shorten),
        ("trained", shorten),
        ("offsets", shorten),
        ("offsets", lose_pages),
        ("tokens", Path.unlink),
        ("about.json", Path.unlink),
        ("about.json", lambda file: file.write_text("{}")),
        ("about.json", lambda file: file.write_text('{"fing')),
    ],
)
def test_a_damaged_cache_is_made_anew(tokenizer, write_rows, cache, name, damage):
    file = write_rows(ROWS)
    expected = samples(instruct_dataset(tokenizer, source=file))
    damage(next(cache.glob(f"*/{name}")))
    calls = tokenizer.calls
    assert samples(instruct_dataset(tokenizer, source=file)) == expected
    assert tokenizer.calls == calls + len(ROWS)


def test_what_a_killed_process_left_is_removed(tokenizer, write_rows, cache):
    file = write_rows(ROWS)
    instruct_dataset(tokenizer, source=file)
    folder = next(each for each in cache.iterdir() if each.is_dir())
    folder.rename(folder.with_name(folder.name + ".tmp-abc"))
    instruct_dataset(tokenizer, source=file)
    assert [each.name for each in cache.iterdir() if each.is_dir()] == [folder.name]


def write_slowly(folder):
    with open(folder.parents[2] / "writers", "a") as log:
        log.write("x")
    time.sleep(0.3)
    row = Row("somewhere:1", {"text": "abc"})
    write_tokens(folder, [row], lambda values: ([1, 2, 3], [True, True, True]))


def load(barrier, queue):
    barrier.wait(60)
    queue.put(load_or_write("key", write_slowly).fingerprint)


def test_of_several_processes_one_writes_and_all_read(cache):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=load, args=(barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    prints = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(30)
    assert len(prints) == 1
    assert (cache.parent.parent / "writers").read_text() == "x"


def test_where_the_cache_cannot_be_written_the_run_goes_on(
    tokenizer, write_rows, tmp_path, monkeypatch, caplog
):
    file = write_rows(ROWS)
    expected = samples(instruct_dataset(tokenizer, source=file))
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MYTUNE_CACHE_DIR", str(tmp_path / "a file"))
    with caplog.at_level(logging.INFO, logger="mytune"):
        ds = instruct_dataset(tokenizer, source=file)
    assert samples(ds) == expected
    assert len(caplog.records) == 1
    assert "MYTUNE_CACHE_DIR" in caplog.text and "a file" in caplog.text


def test_a_full_disk_is_told_and_leaves_nothing_behind(cache):
    def write(folder):
        (folder / "tokens").write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"No space left.*MYTUNE_CACHE_DIR"):
        load_or_write("key", write)
    assert not [each for each in cache.iterdir() if each.is_dir()]


@dataclass
class Shout:
    """A format of the user's own, whose code the cache cannot know."""

    def __call__(self, row):
        return [Message("user", row["input"]), Message("assistant", row["output"].upper())]


@pytest.mark.parametrize("own", ["filter_fn", "message_transform"])
def test_code_of_the_users_own_is_run_every_time(tokenizer, write_rows, cache, own):
    build, arguments = {
        "filter_fn": (instruct_dataset, {"filter_fn": lambda row: len(row["output"]) > 5}),
        "message_transform": (sft_dataset, {"message_transform": Shout(), "split": "train[5:]"}),
    }[own]
    for _ in range(2):
        calls = tokenizer.calls
        ds = build(tokenizer, source=write_rows(ROWS), **arguments)
        assert tokenizer.calls == calls + 2 and len(ds) == 2
    assert text(ds[0]["tokens"]).lower() == "q6aaaaaa"
    assert not cache.exists()


def test_long_rows_are_cut_without_a_forced_end_and_counted(texts):
    ds = text_completion_dataset(CharTokenizer(max_seq_len=6), texts([4, 6, 9, 20]))
    assert ds.lengths.tolist() == [4, 6, 6, 6]
    assert ds[2]["tokens"].tolist() == [1, *[ord("c")] * 5]
    assert ds[2]["labels"].tolist() == [*[ord("c")] * 5, -100]
    assert ds.stats == Stats(rows=4, truncated=2, tokens=22, trainable_tokens=18)
    assert str(ds.stats) == "4 rows, 22 tokens (18 trained); 2 rows truncated to max_seq_len"


def test_a_bad_row_stops_the_run_or_is_skipped_and_counted(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    file.write_text("\n".join([lines[0], '{"input": "x"}', lines[1], "nonsense", lines[2]]))
    with pytest.raises(DataError, match=r"rows.jsonl:2: no column 'output'.*on_bad_row=skip"):
        instruct_dataset(tokenizer, source=str(file))
    ds = instruct_dataset(tokenizer, source=str(file), on_bad_row="skip")
    assert [text(sample["tokens"]) for sample in ds] == ["q1a", "q2aa", "q3aaa"]
    assert ds.stats.skipped == 2
    assert f"2 bad rows skipped, the first: {file}:2: no column 'output'" in str(ds.stats)
    with pytest.raises(ConfigError, match="on_bad_row is 'ignore'"):
        instruct_dataset(tokenizer, source=str(file), on_bad_row="ignore")


def test_a_dataset_with_nothing_to_train_is_an_error(tokenizer, write_rows):
    with pytest.raises(DataError, match=r"no rows: all 7 are bad, the first: .*rows.jsonl:1: no c"):
        text_completion_dataset(tokenizer, write_rows(ROWS), on_bad_row="skip")
    with pytest.raises(DataError, match="none of the dataset's 28 tokens is trained"):
        instruct_dataset(tokenizer, source=write_rows(ROWS), max_seq_len=4)


def test_a_row_without_a_trained_token_is_kept_and_counted(tokenizer, write_rows):
    rows = [{"input": "long", "output": "x"}, {"input": "", "output": "yes"}]
    ds = instruct_dataset(tokenizer, source=write_rows(rows), max_seq_len=6)
    assert np.array_equal(ds[0]["labels"], np.full(6, -100))
    assert (ds.stats.rows, ds.stats.untrained, ds.stats.trainable_tokens) == (2, 1, 2)


@pytest.mark.parametrize(("bad", "warned"), [(1, False), (2, True)])
def test_a_warning_says_that_many_rows_train_nothing_also_if_they_are_cached(
    tokenizer, write_rows, caplog, bad, warned
):
    rows = [{"input": "long question", "output": "x"}] * bad + [{"input": "", "output": "y"}] * 9
    file = write_rows(rows)
    for _ in range(2):
        caplog.clear()
        ds = instruct_dataset(tokenizer, source=file, max_seq_len=6)
        assert ds.stats.untrained == bad
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert told == warned * [
            f"{file}: 2 of 11 rows train nothing, likely as max_seq_len (6) cuts their answers "
            "off: raise it, or take shorter rows"
        ]


def test_a_warning_does_not_blame_a_length_that_cuts_nothing(tokenizer, write_rows, caplog):
    turns = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    rows = [{"m": turns}, {"m": turns[:1]}]
    chat = {"conversation_column": "m", "conversation_style": "openai"}
    chat_dataset(tokenizer, source=write_rows(rows), max_seq_len=100, **chat)
    assert "1 of 2 rows train nothing, likely as they have no answer" in caplog.text
    assert "max_seq_len" not in caplog.text


class Mistake:
    """A format or filter of the user's own that fails at the second row."""

    def __init__(self, error):
        self.error = error

    def __call__(self, row):
        if row["input"] == "q2":
            raise self.error
        return [Message("user", row["input"]), Message("assistant", row["output"])]


def test_so_does_one_of_a_template(write_rows):
    class Template:
        def __call__(self, messages):
            return [messages[9]]

    tokenizer = llama3_tokenizer(ASSETS / "tiny", prompt_template=Template())
    with pytest.raises(DataError, match=r"rows.jsonl:1: IndexError: .*\(.*test_token_cache.py:"):
        instruct_dataset(tokenizer, source=write_rows(ROWS))


def fail_in_a_library(row):
    return json.loads(row["output"])


def test_an_error_of_the_users_own_code_names_the_row_and_the_line(tokenizer, write_rows):
    file, error = write_rows(ROWS), KeyError("inptu")
    line = Mistake.__call__.__code__.co_firstlineno + 2
    told = f"{file}:2: KeyError: 'inptu' ({__file__}:{line}); --debug prints the traceback"
    for options in (
        {"message_transform": Mistake(error)},
        {"message_transform": Mistake(error), "on_bad_row": "skip"},  # the code is wrong, no row
        {"message_transform": InputOutputToMessages(), "filter_fn": Mistake(error)},
    ):
        with pytest.raises(DataError) as raised:
            sft_dataset(tokenizer, source=file, **options)
        assert str(raised.value) == told
        assert raised.value.__cause__ is error


def test_the_line_is_the_users_also_if_a_library_raised_the_error(tokenizer, write_rows):
    line = fail_in_a_library.__code__.co_firstlineno + 1
    with pytest.raises(DataError, match=rf":1: JSONDecodeError: .*test_token_cache.py:{line}\)"):
        sft_dataset(tokenizer, source=write_rows(ROWS), message_transform=fail_in_a_library)


def test_an_error_of_a_file_in_the_users_code_is_not_one_of_the_cache(tokenizer, write_rows):
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "picture.png")
    with pytest.raises(DataError, match=r"rows.jsonl:2: FileNotFoundError: .*picture.png"):
        sft_dataset(tokenizer, source=write_rows(ROWS), message_transform=Mistake(missing))


@pytest.mark.parametrize("error", [ImportError("no spacy"), MemoryError(), TuneError("other")])
def test_what_is_not_of_the_row_stays_what_it_is_and_notes_the_row(tokenizer, write_rows, error):
    with pytest.raises(type(error)) as raised:
        sft_dataset(tokenizer, source=write_rows(ROWS), message_transform=Mistake(error))
    assert raised.value is error
    assert [note.rpartition("/")[2] for note in error.__notes__] == ["rows.jsonl:2"]


def test_a_bug_of_ours_is_not_blamed_on_the_row(tokenizer, write_rows, monkeypatch):
    code = compile("def ours(messages): {}['ours']", tokens.__file__, "exec")
    exec(code, names := {})
    monkeypatch.setattr("mytune.datasets.builders.validate_messages", names["ours"])
    with pytest.raises(KeyError, match="ours") as raised:
        instruct_dataset(tokenizer, source=write_rows(ROWS))
    assert raised.value.__notes__[0].endswith("rows.jsonl:1")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, "the transform made None, not a list of messages"),
        ({"messages": []}, "not a list of messages"),
        ([{"role": "user"}], "the transform made {'role': 'user'}, not a message with text"),
        ([Message("user", None)], "not a message with text"),
    ],
)
def test_what_a_transform_makes_is_checked(tokenizer, write_rows, made, words):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{words}"):
        sft_dataset(tokenizer, source=write_rows(ROWS), message_transform=lambda row: made)


def test_a_filter_sees_only_rows_with_columns(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": "q", "output": "a"}\n["no", "columns"]\n')
    options = {"source": str(file), "filter_fn": lambda row: row["input"] == "q"}
    with pytest.raises(DataError, match=r"rows.jsonl:2: the row is a list"):
        instruct_dataset(tokenizer, **options)
    assert len(instruct_dataset(tokenizer, **options, on_bad_row="skip")) == 1
