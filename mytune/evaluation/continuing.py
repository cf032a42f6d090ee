"""Continuations of contexts, many at once, each until its stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mytune.evaluation.batches import cut, run_batches
from mytune.evaluation.trees import TREE, common_prefix, plant, stack
from mytune.generation import Decoding, Sampling
from mytune.generation.kv_cache import BranchedKVCache, KVCache
from mytune.generation.reading import CachedReader
from mytune.modules.decoder import Cache, Decoder
from mytune.tokenizers import ModelTokenizer
from mytune.training.signals import StopSignal

_SAVED = 256  # keys of which no copy is read, so that it pays to keep them once
_MORE = 4  # times as many tokens as when scoring: a step reads all weights, however few rows it has


class SharedDecoding(Decoding):
    """A `Decoding` that reads what its prompts begin with once, see `mytune.evaluation.trees`."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        enable_kv_cache: bool,
        **rest: Any,
    ) -> None:
        super().__init__(model, prompts, enable_kv_cache=enable_kv_cache, **rest)
        unread = _unread(prompts)
        if enable_kv_cache and any(unread):
            _read_as_trees(model, unread, self._reader.cache)  # type: ignore[union-attr]
            self._tokens = self._tokens[:, -1:]

    def _cached_reader(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        length: int,
        pads: Tensor | None,
        compile: bool,
    ) -> CachedReader:
        first, *others = (np.asarray(row) for row in _unread(prompts))
        common = min((common_prefix(first, row) for row in others), default=0)
        if model.device.type != "cpu" or common * len(others) < _SAVED:
            return super()._cached_reader(model, prompts, length, pads, compile)
        cache = BranchedKVCache(
            model.config,
            common=common,
            batch_size=len(prompts),
            length=length,
            device=model.device,
            dtype=model.dtype,
        )
        return CachedReader(model, cache, pads)


def _unread(prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return what can be read beforehand: all but the last token, whose logits are to come."""
    return [prompt[:-1] for prompt in prompts]


@torch.inference_mode()
def _read_as_trees(model: Decoder, rows: Sequence[Sequence[int]], cache: KVCache) -> None:
    """Read rows, and leave keys and values in the cache as if they had been read left-padded."""
    trees, longest, device = plant(rows, TREE), max(map(len, rows)), model.device
    copies = [
        (number, place, row, longest - len(path) + depth - cache.first)
        for number, its_paths in enumerate(tree.paths for tree in trees)
        for row, path in its_paths.items()
        for depth, place in enumerate(path.tolist())
        if depth >= cache.first
    ]
    tree, place, row, slot = torch.tensor(copies, dtype=torch.long, device=device).view(-1, 4).T

    class Spread(Cache):
        """Copies what a tree's tokens leave to all the rows that they belong to."""

        def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            cache.keys[layer][row, :, slot] = k[tree, :, place]
            cache.values[layer][row, :, slot] = v[tree, :, place]
            if isinstance(cache, BranchedKVCache):  # a tree begins with the first of its paths
                cache.common.update(layer, k[:1, :, : cache.first], v[:1, :, : cache.first])
            return k, v

    tokens, positions, mask = (None if x is None else x.to(device) for x in stack(trees))
    model(tokens, positions, mask, Spread(), output_hidden=True)
    cache.filled = longest - cache.first


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
    decoding = SharedDecoding(
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
