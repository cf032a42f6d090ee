"""A decoder as EleutherAI's harness wants it: text in, log-likelihoods or text out."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mytune.errors import ConfigError, DataError, check_at_least
from mytune.evaluation.answers import KeptAnswers
from mytune.evaluation.batches import check_batch_size
from mytune.evaluation.chat_template import ChatTemplate
from mytune.evaluation.continuing import Prompt, continue_prompts
from mytune.evaluation.scoring import Request, score
from mytune.generation.sampling import Sampling, check_sampling
from mytune.modules.decoder import Decoder
from mytune.tokenizers.base import ModelTokenizer
from mytune.tokenizers.messages import Message
from mytune.training.signals import StopSignal

log = logging.getLogger("mytune")

_DEFAULT_NEW_TOKENS = 256  # the harness's own, where a task does not say
_SAMPLING = tuple(Sampling.__annotations__)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A decoder and its tokenizer, to be given to `lm_eval.evaluate`.

    As in the harness's own model of transformers, texts begin with BOS, names of special tokens in
    them are special tokens, and what is too long loses its beginning. To the harness this is one
    process; ranks share the work inside.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        batch_size: rows at once, or "auto".
        max_seq_length: longest context and continuation; at most the model's positions.
        chat_template: a checkpoint's own, in the place of the tokenizer's chat format.
        seed: of generation that samples.
        stop, kept: see `evaluate`.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: ModelTokenizer,
        *,
        batch_size: int | str = "auto",
        max_seq_length: int | None = None,
        chat_template: ChatTemplate | None = None,
        seed: int = 0,
        stop: StopSignal | None = None,
        kept: KeptAnswers | None = None,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        self.model = model
        self._tokenizer, self._template, self._seed = tokenizer, chat_template, seed
        self.batch_size, self._stop, self._kept = batch_size, stop, kept
        positions = model.config.max_seq_len
        self.max_length = min(max_seq_length or positions, positions)
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        special = re.compile(f"({'|'.join(map(re.escape, names))})")
        self._bos = tokenizer.decode([tokenizer.bos_id], skip_special_tokens=False)
        # A context comes with each of its answers; what is cached holds no model.
        self._encode = lru_cache(maxsize=64)(partial(_encode, tokenizer, special))

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint or f"{type(self._tokenizer).__name__} {id(self)}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return a text's ids; BOS comes first unless it is there or `add_special_tokens` says no.

        Names of special tokens are special tokens, as in the harness.
        """
        begins = string.startswith(self._bos)
        add_bos = not begins if add_special_tokens is None else add_special_tokens
        return ([self._tokenizer.bos_id] if add_bos else []) + self._encode(string)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text: up to where the answer begins, or goes on."""
        if self._template:
            return self._template(chat_history, add_generation_prompt)
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        ids, _ = self._tokenizer.tokenize_messages(messages, add_generation_prompt)
        if not add_generation_prompt and ids[-1] in self._tokenizer.stop_tokens:
            ids = ids[:-1]  # the answer goes on
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it.

        Here only to check texts, and to show no bar while they are tokenized.
        """
        _check_texts(requests)
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        for strings, _context, rest in requests:
            if len(rest) > self.max_length:
                raise ConfigError(
                    f"max_seq_length (or the model) has room for {self.max_length} tokens, and a "
                    f"continuation to score has {len(rest)}, begins with {strings[1][:40]!r} and "
                    "must fit as a whole"
                )
        if empty := sum(not rest for _, _, rest in requests):
            log.warning(
                "%d of %d continuations add no token to their context: their log-likelihood is 0",
                *(empty, len(requests)),
            )
        return self._score([Request(context, rest) for _, context, rest in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return each text's log-likelihood, read in windows as long as the model takes them."""
        _check_texts(requests)
        owners: list[int] = []
        windows: list[Request] = []
        for owner, instance in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(instance.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [Request(*make_disjoint_window(pair)) for pair in pairs]
            windows += found
            owners += [owner] * len(found)
        sums = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._score(windows), strict=True):
            sums[owner] += log_likelihood
        return sums

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Score what fits; of what does not, the end that does."""
        limit = self.max_length + 1  # the last token is predicted, and not read
        extra = [max(len(r.context) + len(r.continuation) - limit, 0) for r in requests]
        self._warn(sum(n > 0 for n in extra), len(requests))
        ends = [
            Request(r.context[n:], r.continuation) for r, n in zip(requests, extra, strict=True)
        ]
        return score(self.model, ends, batch_size=self.batch_size, stop=self._stop, kept=self._kept)

    def _warn(self, count: int, total: int) -> None:
        if count:
            log.warning(
                "%d of %d requests are longer than max_seq_length=%d allows: "
                "their beginnings are left out",
                *(count, total, self.max_length),
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return each context's continuation, up to the first of its stop strings."""
        _check_texts(requests)
        asked = (instance.args for instance in requests)
        prompts = [Prompt(self.tok_encode(text), *read_generation(said)) for text, said in asked]
        rooms = [self.max_length - prompt.max_new_tokens for prompt in prompts]
        if min(rooms, default=1) < 1:
            longest = max(prompt.max_new_tokens for prompt in prompts)
            raise ConfigError(
                f"max_seq_length is {self.max_length}, and a task generates up to {longest} "
                "tokens: it must be larger"
            )
        both = list(zip(prompts, rooms, strict=True))
        self._warn(sum(len(prompt.ids) > room for prompt, room in both), len(prompts))
        return continue_prompts(
            self.model,
            self._tokenizer,
            [replace(prompt, ids=prompt.ids[-room:]) for prompt, room in both],
            batch_size=self.batch_size,
            seed=self._seed,
            stop=self._stop,
            kept=self._kept,
        )


def _check_texts(requests: Sequence[Instance]) -> None:
    """Raise DataError for a request for what is no text: a task's document gave it."""
    for each in requests:
        for part in each.args:
            if not isinstance(part, str | dict):
                raise DataError(
                    f"task {each.task_name}: the model is asked for {part!r}, which is no text; "
                    "does the task's output_type fit its doc_to_text and doc_to_target?"
                )


def _encode(tokenizer: ModelTokenizer, special: re.Pattern[str], string: str) -> list[int]:
    ids: list[int] = []
    for piece in special.split(string):
        if piece in tokenizer.special_tokens:
            ids.append(tokenizer.special_tokens[piece])
        elif piece:
            ids += tokenizer.encode(piece, add_bos=False, add_eos=False)
    return ids


def read_generation(settings: Mapping[str, Any]) -> tuple[int, list[str], Sampling]:
    """Return the most new tokens, the stop strings and the sampling of `generation_kwargs`.

    Raises:
        ConfigError: it asks for what there is not.
    """
    try:
        said = normalize_gen_kwargs(dict(settings), _DEFAULT_NEW_TOKENS)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_kwargs: {error}") from error
    sampling = {name: said.pop(name) for name in _SAMPLING if said.get(name) is not None}
    most, until, sampled = (said.pop(name) for name in ("max_gen_toks", "until", "do_sample"))
    if said.get("num_beams") == 1:
        del said["num_beams"]
    if said:
        raise ConfigError(
            f"generation_kwargs: {', '.join(said)} is not supported; a task can use "
            f"do_sample, until, max_gen_toks, {', '.join(_SAMPLING)}"
        )
    wrong = [name for name, value in sampling.items() if type(value) not in (int, float)]
    wrong += ["until"] if not all(isinstance(stop, str) for stop in until) else []
    if wrong:
        raise ConfigError(f"generation_kwargs: {wrong[0]} is {settings[wrong[0]]!r}")
    if sampled:
        sampling = {"temperature": 1.0, **sampling}
    else:  # the one that greedy decoding knows, too
        sampling = {k: v for k, v in sampling.items() if k == "repetition_penalty"}
    try:
        check_at_least(1, {"max_gen_toks": most})
        check_sampling(**sampling)
    except ConfigError as error:
        raise ConfigError(f"generation_kwargs: {error}") from None
    return most, [stop for stop in until if stop], cast(Sampling, sampling)
