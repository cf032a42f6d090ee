"""The rows that all peers train on, as mytune's datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mytune.datasets.sources import Row
from mytune.datasets.tokens import TokenDataset, write_tokens
from tests.benchmarks.peers.turns import read_rows


def rows(tokenizer: Any, path: str) -> TokenDataset:
    """Write the rows of a file as tokens beside it, and map them."""
    folder = Path(path).with_suffix(".tokens")
    folder.mkdir()
    values = ({"tokens": ids, "trained_from": start} for ids, start in read_rows(path))
    write_tokens(folder, (Row(path, row) for row in values), _encode)
    return TokenDataset(folder)


def _encode(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    tokens, start = row["tokens"], row["trained_from"]
    return tokens, [place >= start for place in range(len(tokens))]
