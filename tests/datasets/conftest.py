"""A cache of its own for every test, a tokenizer, and files of rows."""

from __future__ import annotations

import json

import pytest

from tests.datasets.fake import CharTokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of this test's token cache."""
    monkeypatch.setenv("MYTUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def tokenizer():
    return CharTokenizer()


@pytest.fixture
def write_rows(tmp_path):
    """Write rows to a jsonl file; return its path."""

    def write(rows, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


@pytest.fixture
def texts(write_rows):
    """A text completion file whose rows have the given lengths in tokens (two are BOS and EOS)."""

    def write(lengths):
        rows = [{"text": chr(97 + i % 26) * (n - 2)} for i, n in enumerate(lengths)]
        return write_rows(rows)

    return write
