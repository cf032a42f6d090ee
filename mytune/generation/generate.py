"""The decoding loop: read the prompt in one pass, then one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from mytune.errors import ConfigError, NumericalError
from mytune.generation.kv_cache import KVCache
from mytune.generation.sampling import check_sampling, sample
from mytune.modules.decoder import Decoder, DecoderConfig


def check_prompt(prompt_ids: Sequence[int], config: DecoderConfig) -> None:
    """Raise ConfigError for a prompt that a model of these sizes cannot continue."""
    if not prompt_ids:
        raise ConfigError("the prompt has no tokens; it needs at least one, such as BOS")
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


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    enable_kv_cache: bool = True,
) -> Iterator[int]:
    """Return an iterator over the tokens that continue a prompt, each made when it is asked for.

    It ends after `max_new_tokens`, before a stop token, or where the model's positions end.

    Args:
        model: its weights say device and dtype.
        prompt_ids: what is continued, with its BOS token.
        max_new_tokens: at most this many tokens.
        temperature, top_k, top_p: see `sample`; 0 is greedy.
        stop_tokens: end the text; they are not part of it.
        generator: of the model's device; the same seed gives the same tokens.
        enable_kv_cache: keep keys and values; if not, every token reads the whole text again.

    Raises:
        ConfigError: a prompt that does not fit the model, or impossible sampling settings.
        NumericalError: logits that are not finite.
    """
    check_prompt(prompt_ids, model.config)
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    tokens = torch.tensor([prompt_ids], device=model.embed_tokens.weight.device)
    length = min(len(prompt_ids) + max_new_tokens, model.config.max_seq_len)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    new_tokens = (int(token) for token in _decode(model, tokens, length, choose, enable_kv_cache))
    return takewhile(lambda token: token not in stop_tokens, new_tokens)


@torch.inference_mode()
def _decode(
    model: Decoder,
    tokens: Tensor,
    length: int,
    choose: Callable[[Tensor], Tensor],
    enable_kv_cache: bool,
) -> Iterator[Tensor]:
    """Yield every row's next token, [b], until the rows [b, s] would be `length` long.

    `choose` makes tokens [b] of logits [b, vocab].
    """
    weight = model.embed_tokens.weight
    cache = None
    if enable_kv_cache:
        cache = KVCache(
            model.config,
            batch_size=len(tokens),
            length=length,
            device=weight.device,
            dtype=weight.dtype,
        )
    positions = torch.arange(length, device=weight.device)[None]
    unread = tokens
    for end in range(tokens.shape[1], length):
        where = positions[:, end - unread.shape[1] : end]
        hidden = model(unread, where, cache=cache, output_hidden=True)
        logits = model.head(hidden[:, -1])
        if unread is tokens and not logits.isfinite().all():
            raise NumericalError(
                "the model's logits are not finite: its weights are damaged, or too large for dtype"
            )
        token = choose(logits)
        yield token
        unread = token[:, None] if cache else torch.cat((unread, token[:, None]), dim=1)
