"""Continuations of contexts, many at once, each until its stop strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mytune.evaluation.answers import KeptAnswers
from mytune.evaluation.batches import cut, run_batches
from mytune.generation.sampling import Sampling
from mytune.generation.text import complete
from mytune.modules.decoder import Decoder
from mytune.tokenizers.base import ModelTokenizer
from mytune.training.signals import StopSignal

_MORE = 4  # times as many tokens as when scoring: a step reads all weights, however few rows it has


@dataclass(frozen=True)
class Prompt:
    """A context to continue.

    Args:
        ids: the context, short enough for `max_new_tokens` more.
        until: texts that end the continuation.
        sampling: see `mytune.generation.sample`.
    """

    ids: Sequence[int]
    max_new_tokens: int
    until: Sequence[str]
    sampling: Sampling = field(default_factory=Sampling)

    def __len__(self) -> int:
        return len(self.ids) + self.max_new_tokens


def continue_prompts(
    model: Decoder,
    tokenizer: ModelTokenizer,
    prompts: Sequence[Prompt],
    *,
    batch_size: int | str = "auto",
    seed: int = 0,
    stop: StopSignal | None = None,
    kept: KeptAnswers | None = None,
) -> list[str]:
    """Return each prompt's continuation, up to the first of its stop strings.

    Prompts of like length, with the same sampling and stop strings, go together. Ranks share the
    work, and all know all texts; draws depend on the seed and the batch, not on the number of
    ranks. For `stop`, see `run_batches`, for `kept` `score`.
    """
    device = model.device
    kinds: dict[str, list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        kind = repr((sorted(prompts[i].sampling.items()), prompts[i].until))
        kinds.setdefault(kind, []).append(i)
    batches = [
        batch
        for kind in kinds.values()
        for batch in cut(kind, lambda i: -(-len(prompts[i]) // _MORE), batch_size, device)
    ]

    def work(batch: list[int]) -> dict[int, str]:
        completions = complete(
            model,
            [prompts[i].ids for i in batch],
            tokenizer,
            stop=prompts[batch[0]].until,
            max_new_tokens=[prompts[i].max_new_tokens for i in batch],
            generator=torch.Generator(device).manual_seed(seed + batch[0]),
            **prompts[batch[0]].sampling,
        )
        return {i: each.text for i, each in zip(batch, completions, strict=True)}

    said = (seed, tokenizer.fingerprint, tokenizer.stop_tokens, tokenizer.special_tokens)
    answer: Callable[[list[int]], Mapping[int, str]] = work
    if kept and tokenizer.fingerprint is not None:  # another may decode otherwise next time
        answer = kept.remembering(work, lambda i: (i, prompts[i], said))
    texts = run_batches(batches, answer, "generation", model, stop=stop)
    return [texts[i] for i in range(len(prompts))]
