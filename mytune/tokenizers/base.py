"""What the rest of mytune asks of a tokenizer, and decoding as ids come."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from mytune.errors import ConfigError
from mytune.tokenizers.messages import Message

log = logging.getLogger("mytune")


class StreamDecoder:
    """Text of ids that come one by one; bytes of an unfinished character are held back.

    What all calls return, joined, is what `decode` returns for all ids.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain (often empty)."""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Return what was held back, with U+FFFD for a character that was never finished."""
        return self._utf8.decode(b"", final=True)


def check_vocabulary(tokenizer: ModelTokenizer, vocab_size: int) -> None:
    """Raise ConfigError for a tokenizer with ids that a model has not; warn of one that lacks many.

    Models are often a little larger: their vocabulary is filled up to a round number.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {vocab_size}: "
            "tokenizer.path or model is of another family"
        )
    if tokenizer.vocab_size < 0.9 * vocab_size:
        log.warning(
            "the tokenizer has %d ids and the model %d: tokenizer.path may be of another family",
            tokenizer.vocab_size,
            vocab_size,
        )


class ModelTokenizer(Protocol):
    """Text and conversations to ids, and back."""

    bos_id: int
    eos_id: int
    pad_id: int
    stop_tokens: list[int]
    vocab_size: int
    max_seq_len: int | None
    special_tokens: dict[str, int]
    # Jinja that gives the same ids of a conversation as `tokenize_messages`; None if there is none.
    chat_template: str | None
    # Equal for two tokenizers only if they give equal ids; None where nobody can know.
    fingerprint: str | None

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the ids of `text`; what looks like a special token in it is text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`, with U+FFFD where they are not UTF-8."""

    def tokenize_messages(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return ids and, for each, whether it is masked (True = not trained). Never truncates."""

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder for the ids of one answer, special tokens left out."""
