"""Choosing the next token: greedy, or drawn at a temperature from the likeliest ones.

What a setting means, and the order in which they apply, are transformers': repetition penalty,
temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from mytune.errors import ConfigError

_COLDEST = 1e-30  # colder, logits divided by it are beyond float32


class Sampling(TypedDict, total=False):
    """How tokens are chosen; see `sample`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float


def check_sampling(
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise ConfigError for settings that cannot be followed, all at once."""
    problems = []
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k is {top_k}; it must be at least 1, or null for all")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}; it must be above 0 and at most 1, or null for all")
    if min_p is not None and not 0 <= min_p <= 1:
        problems.append(f"min_p is {min_p}; it must be from 0 to 1, or null for all")
    if not 0 < repetition_penalty < float("inf"):
        problems.append(f"repetition_penalty is {repetition_penalty}; it must be above 0 (1: none)")
    if problems:
        raise ConfigError("; ".join(problems))


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return one token for each row of logits: [b, vocab] -> [b], without waiting for the device.

    Args:
        logits: of the last position.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only these many likeliest tokens.
        top_p: only the likeliest tokens that together reach this probability, after `top_k`
            (https://arxiv.org/abs/1904.09751).
        min_p: only tokens at least this many times as likely as the likeliest one
            (https://arxiv.org/abs/2407.01082).
        repetition_penalty: the logits of `seen` tokens are divided by it if positive and multiplied
            if negative, before all else (https://arxiv.org/abs/1909.05858).
        seen: the tokens that a row has, bool [b, vocab].
        generator: of the logits' device.
    """
    logits = logits.float()  # argmax of 32,000 bfloat16 numbers takes 4 times as long on a CPU
    if seen is not None:
        worse = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, worse, logits)
    if temperature < _COLDEST:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_p == 1:
        top_p = None  # rounded sums reach 1 before the last token
    if top_k is None and top_p is None:
        return _draw(_at_least(logits.softmax(dim=-1), min_p), generator)
    vocab = logits.shape[-1]
    likeliest, tokens = logits.topk(min(top_k or vocab, vocab), dim=-1)
    probabilities = likeliest.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return tokens.gather(-1, _draw(_at_least(probabilities, min_p), generator)[:, None])[:, 0]


def _at_least(probabilities: Tensor, min_p: float | None) -> Tensor:
    if not min_p:
        return probabilities
    least = min_p * probabilities.amax(dim=-1, keepdim=True)
    return probabilities.masked_fill(probabilities < least, 0.0)


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index per row; probabilities need not sum to 1.

    The largest of p / Exp(1) is a draw from p. `torch.multinomial` would wait for the device.
    """
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)  # 0 / 0 would let an excluded token win
    return (probabilities / clocks).argmax(dim=-1)


class Sampler:
    """Chooses a token for every row, and remembers what rows have seen where that matters."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
        generator: torch.Generator | None,
        sampling: Sampling,
    ) -> None:
        self._sampling, self._generator = sampling, generator
        self._seen: Tensor | None = None
        if sampling.get("repetition_penalty", 1.0) != 1.0:
            self._seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
            for row, ids in zip(self._seen, rows, strict=True):
                row[torch.tensor(ids, device=device)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the tokens [b] that follow, given logits [b, vocab]."""
        tokens = sample(logits, seen=self._seen, generator=self._generator, **self._sampling)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens
