"""Prompts that are continued together say what each says alone."""

from __future__ import annotations

import pytest
import torch

from mytune.errors import ConfigError, NumericalError
from mytune.generation import Decoding, KVCache, generate, generate_batch, pack_linears
from mytune.generation import decoding as decoding_loop
from mytune.generation.decoding import _left_padded
from mytune.generation.reading import CachedReader, StaticReader
from tests.generation.conftest import VARIED
from tests.hf import twins

# Of 1 to 40 tokens, the longest one neither first nor last.
PROMPTS = [[1, 5, 9], [1], [(7 * i + 1) % 160 for i in range(40)], [1, 80, 3, 20, 11, 9, 30]]


def kv_cache(model, rows, length=64):
    return KVCache(model.config, batch_size=rows, length=length, device="cpu", dtype=torch.float32)


READERS = {
    "growing": lambda model, pads: CachedReader(model, kv_cache(model, 4), pads),
    "static": lambda model, pads: StaticReader(model, kv_cache(model, 4), pads),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("reader", READERS)
def test_logits_of_left_padded_rows_equal_those_of_each_alone(reader, kv_heads):
    model, _ = twins(num_key_value_heads=kv_heads)
    tokens, pads = _left_padded(PROMPTS, torch.device("cpu"))
    reads = READERS[reader](model, pads).read
    new = torch.randint(0, 160, (4, 20), generator=torch.Generator().manual_seed(1))
    seen = [reads(tokens), *(reads(new[:, i : i + 1]) for i in range(20))]
    for row, prompt in enumerate(PROMPTS):
        alone = torch.tensor([prompt + new[row].tolist()])
        with torch.no_grad():
            expected = model(alone)[0, len(prompt) - 1 :]
        ours = torch.stack([logits[row] for logits in seen])
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}], ids=["greedy", "penalty"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_says_what_each_prompt_says_alone(packed, settings):
    model, _ = twins(**VARIED)
    if packed:
        pack_linears(model)
    alone = [list(generate(model, each, max_new_tokens=60, **settings)) for each in PROMPTS]
    assert generate_batch(model, PROMPTS, max_new_tokens=60, **settings) == alone
    assert all(len(set(each)) > 20 for each in alone)


def test_a_batch_says_what_transformers_says():
    ours, theirs = twins(**VARIED)
    tokens, pads = _left_padded(PROMPTS, torch.device("cpu"))
    out = theirs.generate(
        tokens,
        attention_mask=(torch.arange(40) >= pads[:, None]).long(),
        max_new_tokens=50,
        do_sample=False,
        eos_token_id=None,
    )
    assert generate_batch(ours, PROMPTS, max_new_tokens=50) == out[:, 40:].tolist()


def test_rows_end_one_by_one_and_the_last_ends_the_work():
    model, _ = twins(**VARIED)
    endless = generate_batch(model, PROMPTS, max_new_tokens=40)
    stop = endless[0][10]
    forwards = []
    model.register_forward_hook(lambda module, args, out: forwards.append(args[0].shape))
    limits = [40, 5, 12, 7]
    decoding = Decoding(model, PROMPTS, max_new_tokens=limits, stop_tokens=[stop])
    steps = list(decoding)
    expected = [row[:most] for row, most in zip(endless, limits, strict=True)]
    expected = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert [row.tokens for row in decoding.rows] == expected
    assert [row.ended for row in decoding.rows] == [
        "length" if len(row) == most else "stop" for row, most in zip(expected, limits, strict=True)
    ]
    for row, tokens in enumerate(expected):
        assert [step[row] for step in steps] == tokens + [None] * (len(steps) - len(tokens))
    assert forwards == [(4, 40)] + [(4, 1)] * (len(steps) - 1)


def test_the_caller_can_end_a_row():
    model, _ = twins(**VARIED)
    endless = generate_batch(model, PROMPTS[:2], max_new_tokens=30)
    decoding = Decoding(model, PROMPTS[:2], max_new_tokens=30)
    for number, _ in enumerate(decoding, 1):
        if number == 7:
            decoding.stop(1)
        if number == 12:
            decoding.stop(0)
    assert [row.tokens for row in decoding.rows] == [endless[0][:12], endless[1][:7]]
    assert [row.ended for row in decoding.rows] == ["stop", "stop"]
    assert number == 12


def test_a_decoding_begins_once():
    model, _ = twins(**VARIED)
    decoding = Decoding(model, PROMPTS[:1], max_new_tokens=3)
    next(iter(decoding))
    with pytest.raises(RuntimeError, match="iterated once"):
        next(iter(decoding))


def test_samples_of_a_prompt_read_it_once():
    model, _ = twins(**VARIED)
    forwards = []
    model.register_forward_hook(lambda module, args, out: forwards.append(args[0].shape))
    warm = {"temperature": 1.0, "max_new_tokens": 30}
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    samples = generate_batch(model, PROMPTS[:2], num_samples=3, generator=seeds[0], **warm)
    assert forwards[:2] == [(2, 3), (6, 1)]
    repeated = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    assert samples == generate_batch(model, repeated, generator=seeds[1], **warm)
    assert len({tuple(each) for each in samples}) == 6


def test_samples_of_a_greedy_row_are_alike():
    model, _ = twins(**VARIED)
    alone = generate_batch(model, [[1]], max_new_tokens=20, compile=False)
    assert generate_batch(model, [[1]], max_new_tokens=20, num_samples=2) == alone * 2


@pytest.mark.parametrize("warm", [False, True])
def test_logprobs_are_those_of_the_model_alone(warm):
    model, _ = twins()
    sampling = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2} if warm else {}
    seed = torch.Generator().manual_seed(1)
    decoding = Decoding(
        model, PROMPTS, max_new_tokens=20, logprobs=True, generator=seed, **sampling
    )
    list(decoding)
    for prompt, row in zip(PROMPTS, decoding.rows, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row.tokens]))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(20), row.tokens]
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=2e-6)


def decoded(model, prompts, **settings):
    """Return tokens, log-probabilities and ends of all rows, and how often the model read."""
    reads, handle = [], model.layers[0].register_forward_hook(lambda *_: reads.append(1))
    seed = torch.Generator().manual_seed(1)
    decoding = Decoding(model, prompts, logprobs=True, generator=seed, **settings)
    list(decoding)
    handle.remove()
    return [(row.tokens, row.logprobs, row.ended) for row in decoding.rows], len(reads)


WARM = {"temperature": 1.0, "repetition_penalty": 1.2, "num_samples": 2}


@pytest.mark.parametrize("settings", [{}, WARM], ids=str)
def test_reading_ahead_changes_nothing(settings, monkeypatch):
    """As on a GPU, which begins with a step before the CPU knows the token."""
    model, _ = twins(**VARIED)
    settings = {"max_new_tokens": [12, 1, 9, 9][: len(PROMPTS)], **settings}
    expected, reads = decoded(model, PROMPTS, **settings)
    stop = expected[0][0][4]
    stopped, fewer = decoded(model, PROMPTS, stop_tokens=[stop], **settings)
    monkeypatch.setattr(decoding_loop, "_reads_ahead", lambda device: True)
    assert decoded(model, PROMPTS, **settings) == (expected, reads)
    found, ahead = decoded(model, PROMPTS, stop_tokens=[stop], **settings)
    assert found == stopped
    assert fewer <= ahead <= fewer + 1  # what was begun when the last row ended


def test_nothing_is_made_of_no_prompts():
    assert generate_batch(twins()[0], [], max_new_tokens=5) == []


def test_each_row_ends_with_the_models_positions():
    model, _ = twins()
    new = generate_batch(model, [[1] * 100, [1] * 120, [1]], max_new_tokens=200)
    assert list(map(len, new)) == [28, 8, 127]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "no tokens"),
        ([[1], [1] * 128], {}, "128 tokens.*128 positions"),
        ([[1], [1]], {"max_new_tokens": [3, 0]}, "max_new_tokens is 0"),
        ([[1]], {"num_samples": 0}, "num_samples is 0"),
        ([[1]], {"min_p": 2.0, "repetition_penalty": 0.0}, "min_p is 2.*repetition_penalty is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(prompts, settings, message):
    model, _ = twins()
    with pytest.raises(ConfigError, match=message):
        generate_batch(model, prompts, **{"max_new_tokens": 5, **settings})


def test_logits_that_are_not_finite_are_an_error():
    model, _ = twins()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        generate_batch(model, PROMPTS, max_new_tokens=3)
