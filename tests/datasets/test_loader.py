"""Batches are a function of seed, epoch and step; ranks share them; nothing is dropped."""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch

from mytune.datasets import BatchLoader, collate, count_targets, text_completion_dataset
from mytune.errors import ConfigError

LENGTHS = [3 + (7 * i) % 10 for i in range(23)]
ORDER = [11, 3, 20, 13, 2, 21, 15, 1]  # of seed 0, epoch 0: must outlive releases of numpy


@pytest.fixture
def dataset(tokenizer, texts):
    return text_completion_dataset(tokenizer, texts(LENGTHS))


def loader(dataset, **changes):
    arguments = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "seed": 0,
        "shuffle": True,
        "pad_id": 4,
    }
    return BatchLoader(dataset, **(arguments | changes))


def rows(batch):
    """A batch's trained rows, as tuples without padding."""
    return [
        tuple(tokens[tokens != 4].tolist())
        for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True)
        if (labels != -100).any()
    ]


def order(steps):
    return [row for step in steps for batch in step for row in rows(batch)]


def all_rows(dataset):
    return sorted(tuple(sample["tokens"].tolist()) for sample in dataset)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_what_one_rank_sees_in_the_same_order(dataset, world_size):
    alone = loader(dataset, gradient_accumulation_steps=8)
    ranks = [
        loader(dataset, gradient_accumulation_steps=8 // world_size, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for expected, *shares in zip(alone.steps(0), *(r.steps(0) for r in ranks), strict=True):
        assert len({len(share) for share in shares}) == 1  # the same number of micro-batches
        merged = [
            row
            for batches in zip(*shares, strict=True)
            for turn in zip_longest(*map(rows, batches))
            for row in turn
            if row
        ]
        assert merged == order([expected])
        assert sum(map(count_targets, shares)) == count_targets(expected)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_is_seen_once_in_every_epoch(dataset, shuffle):
    batches = loader(dataset, shuffle=shuffle)
    assert batches.steps_per_epoch == 6  # 23 rows, 4 each step
    for epoch in (0, 1):
        assert sorted(order(batches.steps(epoch))) == all_rows(dataset)
    assert (order(batches.steps(0)) == order(batches.steps(1))) is not shuffle
    assert [len(batch["tokens"]) for batch in list(batches.steps(0))[-1]] == [2, 1]


def test_a_run_goes_on_at_any_step_as_if_it_had_not_stopped(dataset):
    whole = list(loader(dataset).steps(1))
    for start in range(len(whole) + 1):
        rest = list(loader(dataset).steps(1, start))
        assert len(rest) == len(whole) - start
        for a, b in zip(rest, whole[start:], strict=True):
            assert [x.keys() for x in a] == [y.keys() for y in b]
            assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_the_order_depends_on_seed_and_epoch_and_never_changes(dataset):
    batches = loader(dataset)
    assert batches._order(0)[:8].tolist() == ORDER
    orders = [tuple(loader(dataset, seed=s)._order(e)) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3
    assert orders[0] == tuple(loader(dataset, batch_size=5, world_size=4)._order(0))


def test_rows_of_like_length_share_a_micro_batch(dataset):
    for step in loader(dataset, gradient_accumulation_steps=4).steps(0):
        lengths = [len(row) for batch in step for row in rows(batch)]
        assert lengths == sorted(lengths, reverse=True)


def test_batches_are_padded_on_the_right(dataset):
    batch = collate([dataset[0], dataset[1]], pad_id=4)
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
    }
    assert batch["tokens"][0].tolist() == [1, 97, 2] + [4] * 7
    assert batch["labels"][0].tolist() == [97, 2] + [-100] * 8
    assert batch["tokens"].shape == batch["labels"].shape == (2, 10)
    assert count_targets([batch, batch]) == 2 * (2 + 9)


def test_packs_are_padded_to_their_full_length(tokenizer, texts):
    packed = text_completion_dataset(
        tokenizer, texts([4, 3, 6]), packed=True, max_seq_len=10, split_across_pack=False
    )
    [[batch]] = loader(packed, shuffle=False).steps(0)
    assert batch.pop("rows").tolist() == [0, 1]
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(
        ("tokens", "labels", "positions", "document_ids"), (2, 10)
    )
    assert batch["positions"].tolist() == [[*range(4), *range(6)], [*range(3), *[0] * 7]]
    assert batch["document_ids"].tolist() == [[0] * 4 + [1] * 6, [0] * 3 + [-1] * 7]


@pytest.mark.parametrize("packed", [False, True])
def test_a_rank_without_rows_gets_one_that_trains_nothing(tokenizer, texts, packed):
    ds = text_completion_dataset(tokenizer, texts([6, 6, 6]), packed=packed, max_seq_len=6)
    ranks = [loader(ds, rank=r, world_size=4, batch_size=1) for r in range(4)]
    steps = [list(rank.steps(0)) for rank in ranks]
    assert [len(step) for each in steps for step in each] == [1] * 4
    assert [count_targets(step) for [step] in steps] == [5, 5, 5, 0]
    [[spare]] = steps[3]
    assert spare["tokens"].shape == (1, 6 if packed else 1)
    assert spare.keys() == steps[0][0][0].keys()
    assert [count_targets(step) for [step] in steps] == [
        count_targets(step) for rank in ranks for step in rank.steps(0)
    ]  # making the spare row did not damage the row that it is made of


def test_max_steps_end_an_epoch_early(dataset):
    assert loader(dataset, max_steps_per_epoch=2).steps_per_epoch == 2
    short = list(loader(dataset, max_steps_per_epoch=2).steps(0))
    assert order(short) == order(list(loader(dataset).steps(0))[:2])
    assert loader(dataset, max_steps_per_epoch=100).steps_per_epoch == 6


@pytest.mark.parametrize(
    "name", ["batch_size", "gradient_accumulation_steps", "max_steps_per_epoch"]
)
def test_numbers_below_one_are_refused(dataset, name):
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        loader(dataset, **{name: 0})
