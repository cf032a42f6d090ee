"""Tokens are drawn from exactly the distribution that temperature, top_k and top_p describe."""

from __future__ import annotations

import pytest
import torch

from mytune.errors import ConfigError
from mytune.generation import check_sampling, sample

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
