"""Batches and scores: against every sequence read alone."""

from __future__ import annotations

import random

import pytest
import torch

from mytune.errors import ConfigError
from mytune.evaluation import Request, batches, check_batch_size, score
from mytune.evaluation.batches import cut, run_batches
from tests.generation.conftest import sequences
from tests.hf import twins

CPU = torch.device("cpu")


@torch.no_grad()
def alone(model, requests):
    """Score each request by a forward of its own, through all logits."""
    found = []
    for context, continuation in requests:
        ids = torch.tensor([[*context, *continuation]])
        logits = model(ids[:, :-1])[0, len(context) - 1 :].double()
        picked = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
        greedy = logits.argmax(-1).tolist() == list(continuation)
        found.append((float(picked.sum()), greedy))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_scores_are_those_of_requests_read_alone(batch_size):
    model, _ = twins()
    draw = random.Random(1)
    cuts = [(s, draw.randrange(1, len(s) + 1)) for s in sequences(1) for _ in range(2)]
    requests = [Request(s[:at], [*s[at:], draw.randrange(3, 160)]) for s, at in cuts]
    with torch.no_grad():  # some that greedy decoding gives
        likely = [int(model(torch.tensor([s]))[0, -1].argmax()) for s, _ in cuts[:9]]
    requests += [Request(s, [token]) for (s, _), token in zip(cuts, likely, strict=False)]
    found, wanted = score(model, requests, batch_size=batch_size), alone(model, requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert sum(greedy for _, greedy in found) >= 9
    assert [s for s, _ in found] == pytest.approx([s for s, _ in wanted], rel=0, abs=2e-5)


def test_a_continuation_without_tokens_is_certain():
    model, _ = twins()
    empty = [Request([5, 6], []), Request([5], [])]
    first, scored, last = score(model, [empty[0], Request([5], [6]), empty[1]])
    assert (first, last) == ((0.0, True), (0.0, True))
    assert [scored] == score(model, [Request([5], [6])])
    assert score(model, empty, batch_size=2) == [first, last]


def test_a_batch_is_so_many_rows_or_tokens():
    items = [[0] * n for n in (2000, 1000, 900, 30, 20)]
    assert [len(b) for b in cut(items, len, 2, CPU)] == [2, 2, 1]
    assert [len(b) for b in cut(items, len, "auto", CPU)] == [2, 3]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_does_not_fit_into_memory_is_halved_unless_ranks_must_run_in_step(
    device, caplog, monkeypatch
):
    seen = []
    full = {
        "cpu": RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"),
        "cuda": torch.OutOfMemoryError("full"),
    }[device]

    def work(batch):
        seen.append(len(batch))
        if len(batch) > 2:
            raise full
        return {i: -i for i in batch}

    model, _ = twins()
    found = run_batches([[1, 2, 3, 4, 5], [6]], work, "test", model)
    assert found == {i: -i for i in range(1, 7)}
    assert seen == [5, 2, 3, 1, 2, 1]
    assert "a batch of 5 does not fit into memory" in caplog.text
    monkeypatch.setattr(batches, "is_sharded", lambda _: True)
    with pytest.raises(type(full)):
        run_batches([[1, 2, 3, 4, 5], [6]], work, "test", model)
    assert seen[6:] == [5]


@pytest.mark.parametrize("batch_size", [0, -1, "all"])
def test_an_impossible_batch_size_is_refused(batch_size):
    with pytest.raises(ConfigError, match="1 or more, or auto"):
        check_batch_size(batch_size)
