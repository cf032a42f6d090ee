"""Tokens are drawn from exactly the distribution that temperature, top_k and top_p describe."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mytune.errors import ConfigError
from mytune.generation import check_sampling, generate, sample, sampling
from tests.generation.conftest import VARIED
from tests.hf import twins

DRAWS = 20_000
# Probabilities 0.4, 0.3, 0.2, 0.06, 0.04, not in order.
PROBABILITIES = torch.tensor([0.06, 0.4, 0.04, 0.3, 0.2])


def frequencies(seed=0, **settings):
    rows = PROBABILITIES.log().expand(DRAWS, -1)
    tokens = sample(rows, generator=torch.Generator().manual_seed(seed), **settings)
    return torch.bincount(tokens, minlength=5) / DRAWS


def assert_drawn_from(seen, expected):
    """Compare with four standard errors; what has no probability must never be drawn."""
    expected = expected / expected.sum()
    error = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((seen - expected).abs() <= 4 * error).all(), (seen, expected)


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    assert sample(logits, temperature=0, top_k=3).tolist() == logits.argmax(-1).tolist()


def test_the_coldest_temperatures_take_the_likeliest():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 40
    for temperature in (1e-320, 1e-40, 1e-29):
        assert sample(logits, temperature=temperature).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    assert_drawn_from(frequencies(temperature=temperature), PROBABILITIES ** (1 / temperature))


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 2), (4, 4), (5, 5), (300, 5)])
def test_top_k_draws_from_the_k_likeliest(top_k, kept):
    likeliest = PROBABILITIES.argsort(descending=True)[:kept]
    expected = torch.zeros(5).index_copy(0, likeliest, PROBABILITIES[likeliest])
    assert_drawn_from(frequencies(temperature=1.0, top_k=top_k), expected)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (1.0, 5)]
)
def test_top_p_draws_from_the_fewest_that_reach_p(top_p, kept):
    likeliest = PROBABILITIES.argsort(descending=True)[:kept]
    expected = torch.zeros(5).index_copy(0, likeliest, PROBABILITIES[likeliest])
    assert_drawn_from(frequencies(temperature=1.0, top_p=top_p), expected)


def test_top_p_is_of_what_top_k_and_temperature_leave():
    # Of the three likeliest at temperature 0.5: 0.16, 0.09 and 0.04, of 0.29; 0.8 needs two.
    expected = torch.tensor([0, 0.16, 0, 0.09, 0])
    assert_drawn_from(frequencies(temperature=0.5, top_k=3, top_p=0.8), expected)


def test_what_top_p_excludes_stays_excluded_when_a_random_number_is_zero(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **kwargs: self.zero_())
    assert frequencies(temperature=1.0, top_p=0.3).tolist() == [0, 1, 0, 0, 0]


def test_each_row_is_drawn_from_its_own_logits():
    logits = torch.full((6, 4), -torch.inf)
    wanted = [2, 0, 3, 1, 1, 0]
    logits[range(6), wanted] = 0.0
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}):
        assert sample(logits, temperature=1.0, **settings).tolist() == wanted


def test_a_seed_repeats_and_another_differs():
    draws = [frequencies(seed=seed, temperature=1.0).tolist() for seed in (3, 3, 4)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_impossible_settings_are_reported_together():
    with pytest.raises(ConfigError, match=r"temperature is -1.*top_k is 0.*top_p is 1\.5"):
        check_sampling(-1, 0, 1.5)
    check_sampling(0, None, None)
    check_sampling(2.5, 1, 1.0)
    with pytest.raises(ConfigError, match="temperature is nan"):
        check_sampling(float("nan"), None, None)


def by_transformers(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty):
    """Return the probabilities that transformers would draw from."""
    steps = [
        RepetitionPenaltyLogitsProcessor(float(repetition_penalty)),
        TemperatureLogitsWarper(float(temperature)),
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p and top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ]
    for step in filter(None, steps):
        logits = step(seen, logits)
    return logits.softmax(-1)


def by_us(monkeypatch, logits, seen, **settings):
    """Return the probabilities that `sample` draws from, in the order of the vocabulary."""
    drawn_from = []

    def keep(probabilities, generator):
        drawn_from.append(probabilities)
        return torch.zeros(len(probabilities), dtype=torch.long)

    monkeypatch.setattr(sampling, "_draw", keep)
    ranks = torch.zeros_like(logits, dtype=torch.bool).scatter(1, seen, True)
    sample(logits, seen=ranks, **settings)
    probabilities = drawn_from[0] / drawn_from[0].sum(-1, keepdim=True)
    if settings["top_k"] is None and settings["top_p"] in (None, 1):
        return probabilities
    worse = settings["repetition_penalty"]
    penalized = torch.where(ranks, torch.where(logits < 0, logits * worse, logits / worse), logits)
    order = penalized.argsort(-1, descending=True)[:, : probabilities.shape[1]]
    return torch.zeros_like(logits).scatter(1, order, probabilities)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("top_k", [None, 12, 500])
@pytest.mark.parametrize("top_p", [None, 0.5, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.05, 0.7])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.4])
def test_probabilities_are_those_of_transformers(
    temperature, top_k, top_p, min_p, repetition_penalty, monkeypatch
):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 80, generator=draw) * 3
    seen = torch.randint(0, 80, (6, 30), generator=draw)
    settings = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    expected = by_transformers(logits, seen, **settings)
    ours = by_us(monkeypatch, logits, seen, **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert ((ours > 0) == (expected > 0)).all()


def test_a_penalty_makes_a_greedy_text_what_transformers_makes_it():
    ours, theirs = twins(**VARIED)
    prompt = [1, 5, 77, 20, 9]
    expected = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=80,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.3,
    )[0, len(prompt) :].tolist()
    said = list(generate(ours, prompt, max_new_tokens=80, repetition_penalty=1.3))
    assert said == expected != list(generate(ours, prompt, max_new_tokens=80))


def test_the_first_draws_of_a_seed_do_not_depend_on_what_is_not_asked_for():
    draws = [frequencies(temperature=1.0, **more).tolist() for more in ({}, {"min_p": 0.0})]
    assert draws[0] == draws[1]
