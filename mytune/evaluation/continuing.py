"""Continuations of contexts, many at once, each until its stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mytune.evaluation.batches import cut, run_batches
from mytune.generation import Decoding, Sampling
from mytune.modules.decoder import Decoder
from mytune.tokenizers import ModelTokenizer
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
    enable_kv_cache: bool = True,
    seed: int = 0,
    stop: StopSignal | None = None,
) -> list[str]:
    """Return each prompt's continuation, which may go on a little after a stop string.

    Prompts of one length and one kind of sampling go together. Ranks share the work, and all know
    all texts; draws depend on the seed and the batch, not on the number of ranks. For `stop`,
    see `run_batches`.
    """
    device = model.device
    kinds: dict[str, list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        kinds.setdefault(repr(sorted(prompts[i].sampling.items())), []).append(i)
    batches = [
        batch
        for kind in kinds.values()
        for batch in cut(kind, lambda i: -(-len(prompts[i]) // _MORE), batch_size, device)
    ]

    def work(batch: list[int]) -> dict[int, str]:
        generator = torch.Generator(device).manual_seed(seed + batch[0])
        rows = [prompts[i] for i in batch]
        texts = _continue(model, tokenizer, rows, generator, enable_kv_cache)
        return dict(zip(batch, texts, strict=True))

    texts = run_batches(batches, work, "generation", model, stop=stop)
    return [texts[i] for i in range(len(prompts))]


def _continue(
    model: Decoder,
    tokenizer: ModelTokenizer,
    prompts: Sequence[Prompt],
    generator: torch.Generator,
    enable_kv_cache: bool,
) -> list[str]:
    decoding = Decoding(
        model,
        [prompt.ids for prompt in prompts],
        max_new_tokens=[prompt.max_new_tokens for prompt in prompts],
        stop_tokens=tokenizer.stop_tokens,
        generator=generator,
        enable_kv_cache=enable_kv_cache,
        **prompts[0].sampling,
    )
    streams = [tokenizer.stream_decoder() for _ in prompts]
    texts = [""] * len(prompts)
    for step in decoding:
        for row, token in enumerate(step):
            if token is None:
                continue
            new = streams[row].put(token)
            texts[row] += new
            # Only what the new text ends can be new.
            if any(s in texts[row][-len(s) - len(new) :] for s in prompts[row].until):
                decoding.stop(row)
    return [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]
