"""Choosing the next token: greedy, or drawn at a temperature from the top k or the top p."""

from __future__ import annotations

import torch
from torch import Tensor

from mytune.errors import ConfigError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ConfigError for settings that `sample` cannot follow, all at once."""
    problems = []
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k is {top_k}; it must be at least 1, or null for all")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}; it must be above 0 and at most 1, or null for all")
    if problems:
        raise ConfigError("; ".join(problems))


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return one token for each row of logits: [b, vocab] -> [b], without waiting for the device.

    Args:
        logits: of the last position.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only these many likeliest tokens.
        top_p: only the likeliest tokens that together reach this probability, after `top_k`
            (https://arxiv.org/abs/1904.09751).
        generator: of the logits' device.
    """
    logits = logits.float()  # argmax of 32,000 bfloat16 numbers takes 4 times as long on a CPU
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is None and top_p is None:
        return _draw(logits.softmax(dim=-1), generator)
    vocab = logits.shape[-1]
    likeliest, tokens = logits.topk(min(top_k or vocab, vocab), dim=-1)
    probabilities = likeliest.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return tokens.gather(-1, _draw(probabilities, generator)[:, None])[:, 0]


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index per row; probabilities need not sum to 1.

    Of clocks that ring after exponential times, at these rates, take the first. `torch.multinomial`
    would wait for the device.
    """
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)  # 0 / 0 would let an excluded token win
    return (probabilities / clocks).argmax(dim=-1)
