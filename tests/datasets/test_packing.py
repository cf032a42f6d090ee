"""Packs hold every token of every row once, keep rows apart, and are nearly full."""

from __future__ import annotations

import numpy as np
import pytest

from mytune.datasets import ConcatDataset, PackedDataset, instruct_dataset, text_completion_dataset
from mytune.datasets.packing import plan_packs
from mytune.errors import ConfigError

RNG = np.random.default_rng(0)
LENGTHS = {
    "chat": np.clip(RNG.lognormal(5.5, 1, 5000), 1, 4096),
    "short": np.clip(RNG.lognormal(4, 0.5, 5000), 1, 2048),
    "uniform": RNG.integers(1, 1025, 5000),
}


def documents(pack):
    """A pack's documents, as (tokens, labels)."""
    ids = pack["document_ids"]
    assert ids.tolist() == sorted(ids)
    return [
        (pack["tokens"][ids == i].tolist(), pack["labels"][ids == i].tolist()) for i in set(ids)
    ]


@pytest.mark.parametrize("name", LENGTHS)
def test_packs_are_at_least_98_percent_full(name):
    lengths = LENGTHS[name].astype(np.int64)
    room = int(lengths.max())
    _, starts = plan_packs(lengths, room)
    assert lengths.sum() / ((len(starts) - 1) * room) >= 0.98


@pytest.mark.parametrize(
    ("lengths", "room", "packs"),
    [
        ([5], 5, 1),
        ([5, 5, 5], 5, 3),
        ([1] * 11, 5, 3),
        ([3, 3, 2, 2, 2], 6, 2),
        ([4, 1, 4, 1, 4, 1, 1], 5, 4),
        (RNG.integers(1, 8, 300), 8, None),
        (RNG.integers(1, 300, 50), 300, None),
    ],
)
def test_each_row_is_in_one_pack_and_none_overflows(lengths, room, packs):
    lengths = np.array(lengths)
    order, starts = plan_packs(lengths, room)
    assert sorted(order) == list(range(len(lengths)))
    assert starts[0] == 0 and starts[-1] == len(lengths)
    assert np.add.reduceat(lengths[order], starts[:-1]).max() <= room
    assert packs is None or len(starts) - 1 == packs
    rows = np.split(order, starts[1:-1])
    assert all((np.diff(pack) > 0).all() for pack in rows)  # rows keep their order
    assert (np.diff([pack[0] for pack in rows]) > 0).all()


def test_packed_and_unpacked_hold_the_same_tokens_and_labels(tokenizer, write_rows):
    rows = [{"input": "q" * (i % 7), "output": "a" * (i % 11)} for i in range(60)]
    file = write_rows(rows)
    plain = instruct_dataset(tokenizer, source=file)
    packed = instruct_dataset(tokenizer, source=file, packed=True, max_seq_len=40)
    assert isinstance(packed, PackedDataset) and len(packed) < 60 / 2
    expected = [(sample["tokens"].tolist(), sample["labels"].tolist()) for sample in plain]
    assert sorted(d for pack in packed for d in documents(pack)) == sorted(expected)
    for pack in packed:
        starts = np.flatnonzero(np.diff(pack["document_ids"], prepend=-1))
        ends = np.append(starts[1:], len(pack["tokens"]))
        spans = zip(starts, ends, strict=True)
        assert pack["positions"].tolist() == [i for a, b in spans for i in range(b - a)]
        assert (pack["labels"][ends - 1] == -100).all()
    assert packed.lengths.tolist() == [len(pack["tokens"]) for pack in packed]
    assert packed.stats.tokens == plain.stats.tokens == packed.lengths.sum()
    assert f"packs {packed.stats.tokens / (len(packed) * 40):.1%} full" in str(packed.stats)


def test_a_stream_is_cut_into_full_blocks_and_no_label_is_lost(tokenizer, texts):
    file = texts([7, 5, 30, 2, 9])  # the third spans three blocks; none is truncated
    plain = text_completion_dataset(tokenizer, file)
    packed = text_completion_dataset(tokenizer, file, packed=True, max_seq_len=12)
    assert packed.lengths.tolist() == [12, 12, 12, 12, 5]
    for key in ("tokens", "labels"):
        stream = np.concatenate([sample[key] for sample in plain])
        assert np.array_equal(np.concatenate([pack[key] for pack in packed]), stream)
    assert packed[0]["document_ids"].tolist() == [0] * 7 + [1] * 5
    assert packed[2]["positions"].tolist() == list(range(12))
    assert packed[3]["positions"].tolist() == [*range(6), *range(2), *range(4)]
    assert packed.stats.truncated == 0


def test_text_may_be_packed_without_cutting_rows(tokenizer, texts):
    ds = text_completion_dataset(
        tokenizer, texts([7, 5, 30, 12]), packed=True, max_seq_len=12, split_across_pack=False
    )
    assert ds.lengths.tolist() == [12, 12, 12] and ds.stats.truncated == 1


def test_packing_needs_a_length_that_rows_fit_into(tokenizer, texts):
    file = texts([5, 9])
    with pytest.raises(ConfigError, match="max_seq_len is -3; at least 1, or null"):
        text_completion_dataset(tokenizer, file, max_seq_len=-3)
    with pytest.raises(ConfigError, match=r"set tokenizer\.max_seq_len"):
        text_completion_dataset(tokenizer, file, packed=True)
    with pytest.raises(ConfigError, match="a row of 9 tokens does not fit into packs of 8"):
        PackedDataset(text_completion_dataset(tokenizer, file), 8)


def test_datasets_in_a_list_follow_each_other(tokenizer, write_rows, texts):
    file = write_rows([{"input": "a", "output": "b"}] * 2, "qa.jsonl")
    first = instruct_dataset(tokenizer, source=file)
    second = text_completion_dataset(tokenizer, texts([3, 4, 5]))
    both = ConcatDataset([first, second])
    expected = [sample["tokens"].tolist() for ds in (first, second) for sample in ds]
    assert [sample["tokens"].tolist() for sample in both] == expected
    assert both.lengths.tolist() == [7, 7, 3, 4, 5]
    assert (both.stats.rows, both.stats.tokens, both.pad_to) == (5, 26, None)
    assert both.fingerprint != ConcatDataset([second, first]).fingerprint


def test_a_list_is_packed_altogether_or_not_at_all(tokenizer, texts):
    file = texts([3, 4, 5])
    plain = text_completion_dataset(tokenizer, file)
    packs = [text_completion_dataset(tokenizer, file, packed=True, max_seq_len=n) for n in (6, 8)]
    assert ConcatDataset(packs).pad_to == 8
    for wrong in ([plain, *packs], []):
        with pytest.raises(ConfigError, match=r"packed alike|at least one"):
            ConcatDataset(wrong)
