"""The static step, which CUDA graphs record, says what the growing cache does."""

from __future__ import annotations

import pytest
import torch

from mytune.generation import KVCache, generate_batch
from mytune.generation.reading import StaticReader
from tests.generation.conftest import VARIED
from tests.hf import twins

PROMPTS = [[1, 5, 9], [1], [(7 * i + 1) % 160 for i in range(20)]]


def static_reader(model, rows, length):
    cache = KVCache(model.config, batch_size=rows, length=length, device="cpu", dtype=torch.float32)
    return StaticReader(model, cache)


def test_a_compiled_step_says_the_same_and_one_compilation_serves_every_block_and_position():
    model, _ = twins(**VARIED, num_hidden_layers=2)
    settings = {"max_new_tokens": 40, "repetition_penalty": 1.1}
    expected = generate_batch(model, PROMPTS, **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert generate_batch(model, PROMPTS, compile=True, **settings) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(len(set(each)) > 20 for each in expected)


def test_every_step_reads_and_writes_the_same_memory():
    model, _ = twins()
    reader, seen = static_reader(model, 2, 20), []
    block = reader._block

    def watched(layer, hidden, rope, mask, *kept):
        seen[-1] += [tensor.data_ptr() for tensor in kept]
        return block(layer, hidden, rope, mask, *kept)

    reader._block = watched
    reader.read(torch.ones(2, 5, dtype=torch.long))
    for token in range(6):
        seen.append([tensor.data_ptr() for tensor in reader._inputs or ()])
        reader.read(torch.full((2, 1), token))
        assert len(seen[-1]) >= 3 * len(model.layers)
    del seen[0]  # before there were inputs
    assert all(addresses == seen[0] for addresses in seen)


def test_a_step_may_be_done_again():
    """As when a graph is recorded: the position is written once more, with the same."""
    model, _ = twins()
    once, twice = static_reader(model, 1, 20), static_reader(model, 1, 20)
    for token in ([1, 2, 3], [4], [5], [6]):
        tokens = torch.tensor([token])
        expected, again = once.read(tokens), twice.read(tokens)
        if len(token) == 1:
            again = twice._call()
        torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_a_full_cache_refuses_another_position():
    reader = static_reader(twins()[0], 1, 4)
    reader.read(torch.tensor([[1, 2, 3]]))
    reader.read(torch.tensor([[1]]))
    with pytest.raises(RuntimeError, match="full: it has 4 positions"):
        reader.read(torch.tensor([[1]]))
