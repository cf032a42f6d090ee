"""The decoding loop: read the prompts in one pass, then one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from mytune.errors import ConfigError, NumericalError, check_at_least
from mytune.generation.kv_cache import KVCache, SharedPrefixKVCache
from mytune.generation.packing import can_compile
from mytune.generation.reading import CachedReader, StaticReader
from mytune.generation.sampling import Sampler, Sampling, check_sampling
from mytune.generation.trees import Tree, common_prefix_length, trees_if_shared
from mytune.modules.decoder import Decoder, DecoderConfig

_SAVED = 256  # duplicate keys from which on it pays to keep a shared beginning once


def check_prompt(prompt_ids: Sequence[int], config: DecoderConfig) -> None:
    """Raise ConfigError for a prompt that a model of these sizes cannot continue."""
    if not prompt_ids:
        raise ConfigError("the prompt has no tokens; it needs at least one, such as BOS")
    if min(prompt_ids) < 0:
        raise ConfigError(f"the prompt has token id {min(prompt_ids)}; ids begin with 0")
    if max(prompt_ids) >= config.vocab_size:
        raise ConfigError(
            f"the prompt has token id {max(prompt_ids)} and the model a vocabulary of "
            f"{config.vocab_size}: they do not belong together; change tokenizer.path or the model"
        )
    if len(prompt_ids) >= config.max_seq_len:
        raise ConfigError(
            f"the prompt has {len(prompt_ids)} tokens, which leaves no room for another one in the "
            f"model's {config.max_seq_len} positions; shorten it"
        )


class PromptCache:
    """What one row's reader has read, kept from prompt to prompt: only what is new is read.

    Args:
        model: the decoder that reads.
        length: positions of the longest prompt and its new tokens together.
        compile: see `Decoding`.
    """

    def __init__(self, model: Decoder, length: int, compile: bool = False) -> None:
        self.reader = _cached_reader(model, 1, length, None, compile)
        self.length = length
        self.ids: list[int] = []  # of prompt and answer; the first `cache.filled` are in the cache

    def recall(self, prompt_ids: Sequence[int]) -> int:
        """Forget all that `prompt_ids` does not begin with; return how much of it is known."""
        cache = self.reader.cache
        # The last token is read again: what follows it has to be known.
        cache.filled = common_prefix_length([self.ids[: cache.filled], prompt_ids[:-1]])
        self.ids = list(prompt_ids)
        return cache.filled


@dataclass
class Row:
    """A row of a `Decoding`: what has come so far.

    Attributes:
        tokens: the new tokens, without a stop token.
        logprobs: log-probability of each under the model alone, whatever the sampling.
        left: how many tokens may still come; 0 once it has ended.
        ended: why: "stop" for a stop token or on request, "length" for the last one allowed.
    """

    left: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: Literal["stop", "length"] = "length"


class Decoding:
    """Prompts that are continued together: iterate for each step's tokens.

    A step is a list with every row's new token, None for rows that have ended: after
    `max_new_tokens`, before a stop token, where the model's positions end, or when `stop` is
    called. `rows` holds what has come so far. A step is computed when it is asked for; a GPU begins
    with the one after it.

    Args:
        model: its weights say device and dtype.
        prompts: what is continued, each with its BOS token; read left-padded, in one pass. What
            several of them begin with is read once, if that saves a quarter.
        max_new_tokens: at most this many tokens, for all rows or for each prompt.
        num_samples: rows for each prompt, side by side; the prompt is read once.
        stop_tokens: end a row; they are not part of it.
        logprobs: keep each token's log-probability.
        generator: of the model's device; the same seed gives the same tokens.
        compile: compile the step for one token per row, if `can_compile`; takes a while, worth it
            for many steps.
        prompt_cache: what is known of a single prompt, and is to be kept for the next one.
        sampling: see `sample`; greedy if nothing is given.

    Raises:
        ConfigError: a prompt that does not fit the model, or impossible settings.
        NumericalError: while iterating: a prompt's logits are not finite.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        num_samples: int = 1,
        stop_tokens: Collection[int] = (),
        logprobs: bool = False,
        generator: torch.Generator | None = None,
        compile: bool = False,
        prompt_cache: PromptCache | None = None,
        **sampling: Unpack[Sampling],
    ) -> None:
        for prompt in prompts:
            check_prompt(prompt, model.config)
        positions = model.config.max_seq_len
        if prompt_cache:
            _check_fits(prompt_cache, prompts, num_samples)
            positions = min(positions, prompt_cache.length)
        check_sampling(**sampling)
        limits = _limits(prompts, max_new_tokens, positions)
        check_at_least(1, {"num_samples": num_samples})
        self.rows = [Row(limit) for limit in limits for _ in range(num_samples)]
        self._stop_tokens, self._logprobs = frozenset(stop_tokens), logprobs
        self._prompt_cache, self._samples, self._begun = prompt_cache, num_samples, False
        self._trees: list[Tree] = []
        if not prompts:
            return
        device = model.device
        known = prompt_cache.recall(prompts[0]) if prompt_cache else 0
        self._tokens, pads = _left_padded([prompt[known:] for prompt in prompts], device)
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        self._choose = Sampler(repeated, model.config.vocab_size, device, generator, sampling)
        if prompt_cache:
            self._reader = prompt_cache.reader
        else:
            length = self._tokens.shape[1] + max(limits)
            before = [prompt[:-1] for prompt in prompts]  # the last token's logits are to come
            self._trees = trees_if_shared(before) if any(before) else []
            common = common_prefix_length(before) if self._trees else 0
            self._reader = _cached_reader(model, len(prompts), length, pads, compile, common)

    def stop(self, row: int) -> None:
        """End a row after the tokens that it has, even if they are all that it may have."""
        self.rows[row].left = 0
        self.rows[row].ended = "stop"

    def __iter__(self) -> Iterator[list[int | None]]:
        if not any(row.left for row in self.rows):
            return
        if self._begun:
            raise RuntimeError("a Decoding can be iterated once")
        self._begun = True
        for chosen, logprobs in self._decode(max(row.left for row in self.rows)):
            step = [
                self._take(row, token, logprob)
                for row, (token, logprob) in enumerate(zip(chosen, logprobs, strict=True))
            ]
            yield step
            if not any(row.left for row in self.rows):
                return

    def _decode(self, steps: int) -> Iterator[tuple[list[int], Sequence[float | None]]]:
        """Yield every row's next token and, if wanted, its log-probability, for so many steps."""
        logits = self._read_prompts()
        if not logits.isfinite().all():
            raise NumericalError(
                "the model's logits are not finite: its weights are damaged, or too large for dtype"
            )
        if self._samples > 1:
            self._reader.repeat(self._samples)
            logits = logits.repeat_interleave(self._samples, dim=0)
        for left in range(steps - 1, -1, -1):
            chosen = self._choose(logits)
            arrive = _send([chosen, _logprobs(logits, chosen)] if self._logprobs else [chosen])
            ahead = _reads_ahead(chosen.device)
            if left and ahead:
                logits = self._reader.read(chosen[:, None])
            ids, *values = arrive()
            yield ids, values[0] if values else [None] * len(ids)
            if left and not ahead:
                logits = self._reader.read(chosen[:, None])

    def _read_prompts(self) -> Tensor:
        """Return the logits [b, vocab] after the prompts."""
        if not self._trees:
            return self._reader.read(self._tokens)
        self._reader.read_trees(self._trees)
        return self._reader.read(self._tokens[:, -1:])

    def _take(self, number: int, token: int, logprob: float | None) -> int | None:
        """Add a token to a row; return None if it has ended."""
        row = self.rows[number]
        if row.left and token in self._stop_tokens:
            self.stop(number)
        if not row.left:
            return None
        row.left -= 1
        row.tokens.append(token)
        if logprob is not None:
            row.logprobs.append(logprob)
        if self._prompt_cache:
            self._prompt_cache.ids.append(token)  # as soon as it is read, if it is
        return token


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    compile: bool = False,
    prompt_cache: PromptCache | None = None,
    **sampling: Unpack[Sampling],
) -> Iterator[int]:
    """Return an iterator over the tokens that continue a prompt, each made when it is asked for.

    It ends after `max_new_tokens`, before a stop token, or where the model's positions end. The
    arguments, and what is raised, are those of `Decoding`.
    """
    decoding = Decoding(
        model,
        [prompt_ids],
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        generator=generator,
        compile=compile,
        prompt_cache=prompt_cache,
        **sampling,
    )
    return (token for step in decoding for token in step if token is not None)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    num_samples: int = 1,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    compile: bool = False,
    **sampling: Unpack[Sampling],
) -> list[list[int]]:
    """Return the new tokens of every prompt, `num_samples` lists for each, side by side.

    The arguments, and what is raised, are those of `Decoding`, which also tells log-probabilities
    and lets its caller end rows.
    """
    decoding = Decoding(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        stop_tokens=stop_tokens,
        generator=generator,
        compile=compile,
        **sampling,
    )
    for _ in decoding:
        pass
    return [row.tokens for row in decoding.rows]


def _reads_ahead(device: torch.device) -> bool:
    """Say whether a token is read before the CPU knows it: so a GPU never waits for the CPU.

    On the CPU a step would be computed for nothing where a stop token ends the text.
    """
    return device.type == "cuda"


def _send(tensors: Sequence[Tensor]) -> Callable[[], list[list[Any]]]:
    """Send tensors to the CPU; return a function that waits for them and returns them as lists."""
    if not tensors[0].is_cuda:
        return lambda: [tensor.tolist() for tensor in tensors]
    there = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
    for target, tensor in zip(there, tensors, strict=True):
        target.copy_(tensor, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record(torch.cuda.current_stream(tensors[0].device))

    def arrive() -> list[list[Any]]:
        sent.synchronize()
        return [target.tolist() for target in there]

    return arrive


def _logprobs(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the log-probabilities [b] of chosen tokens [b] under logits [b, vocab]."""
    return logits.float().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]


def _check_fits(cache: PromptCache, prompts: Sequence[Sequence[int]], num_samples: int) -> None:
    if len(prompts) * num_samples != 1:
        raise ConfigError("a prompt cache is of one row: give it one prompt, and num_samples=1")
    if len(prompts[0]) >= cache.length:
        raise ConfigError(
            f"the prompt has {len(prompts[0])} tokens, which leaves no room for another one in "
            f"the KV cache's {cache.length} positions"
        )


def _limits(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], positions: int
) -> list[int]:
    """Return how many new tokens each prompt may get."""
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    check_at_least(1, {"max_new_tokens": min(max_new_tokens, default=None)})
    pairs = zip(prompts, max_new_tokens, strict=True)
    return [min(most, positions - len(prompt)) for prompt, most in pairs]


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return prompts as [b, s], and how much padding each row begins with, [b], if any does."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    return (
        torch.tensor(rows, device=device),
        torch.tensor(pads, device=device) if any(pads) else None,
    )


def _cached_reader(
    model: Decoder, rows: int, length: int, pads: Tensor | None, compile: bool, common: int = 0
) -> CachedReader:
    """Return what reads so many rows; `common` positions of them are the same."""
    compile = compile and can_compile(model)
    static = compile or model.device.type == "cuda"
    static &= type(model).forward is Decoder.forward  # which StaticReader does in its place
    if static:
        length = -(-length // 256) * 256  # few lengths: each is compiled for itself
    device, dtype = model.device, model.dtype
    sizes: dict[str, Any] = dict(batch_size=rows, length=length, device=device, dtype=dtype)
    if static:
        return StaticReader(model, KVCache(model.config, **sizes), pads, compile)
    if device.type != "cpu" or common * (rows - 1) < _SAVED:
        return CachedReader(model, KVCache(model.config, **sizes), pads)
    return CachedReader(model, SharedPrefixKVCache(model.config, common=common, **sizes), pads)
