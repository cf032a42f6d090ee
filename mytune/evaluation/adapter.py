"""A decoder as EleutherAI's harness wants a language model: text in, log-likelihoods or text out."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.models.utils import postprocess_generated_text as cut_at_stops
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mytune.errors import ConfigError
from mytune.evaluation.batches import check_batch_size
from mytune.evaluation.scoring import Request, score
from mytune.modules.decoder import Decoder
from mytune.tokenizers import Message, ModelTokenizer

log = logging.getLogger("mytune")

_DEFAULT_NEW_TOKENS = 256  # the harness's own, where a task does not say


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
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: ModelTokenizer,
        *,
        batch_size: int | str = "auto",
        max_seq_length: int | None = None,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        self.model = model
        self._tokenizer = tokenizer
        self.batch_size = batch_size
        positions = model.config.max_seq_len
        self.max_length = min(max_seq_length or positions, positions)
        self._device = model.embed_tokens.weight.device
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})")
        self._bos = tokenizer.decode([tokenizer.bos_id], skip_special_tokens=False)
        self._encode = lru_cache(maxsize=64)(self._encode_text)  # a context comes with each answer

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return a text's ids; BOS comes first unless it is there or `add_special_tokens` says no.

        Names of special tokens are special tokens, as in the harness.
        """
        begins = string.startswith(self._bos)
        add_bos = not begins if add_special_tokens is None else add_special_tokens
        return ([self._tokenizer.bos_id] if add_bos else []) + self._encode(string)

    def _encode_text(self, string: str) -> list[int]:
        ids: list[int] = []
        special = self._tokenizer.special_tokens
        for piece in self._special.split(string):
            if piece in special:
                ids.append(special[piece])
            elif piece:
                ids += self._tokenizer.encode(piece, add_bos=False, add_eos=False)
        return ids

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text: up to where the answer begins, or goes on."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        ids, _ = self._tokenizer.tokenize_messages(messages, add_generation_prompt)
        if not add_generation_prompt and ids[-1] in self._tokenizer.stop_tokens:
            ids = ids[:-1]  # the answer goes on
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([Request(context, rest) for _, context, rest in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return each text's log-likelihood, read in windows as long as the model takes them."""
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
        longest = max((len(r.continuation) for r in requests), default=0)
        if longest > self.max_length:
            raise ConfigError(
                f"max_seq_length is {self.max_length}, and a continuation to score has {longest} "
                "tokens: it must fit as a whole"
            )
        cut = [len(r.context) + len(r.continuation) - limit for r in requests]
        self._warn(sum(extra > 0 for extra in cut), len(requests))
        shorter = [
            Request(r.context[max(extra, 0) :], r.continuation)
            for r, extra in zip(requests, cut, strict=True)
        ]
        return score(self.model, shorter, batch_size=self.batch_size)

    def _warn(self, count: int, total: int) -> None:
        if count:
            log.warning(
                "%d of %d requests are longer than max_seq_length=%d: their beginnings are left out",
                count,
                total,
                self.max_length,
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return each context's continuation, up to the first of its stop strings."""
        raise NotImplementedError
