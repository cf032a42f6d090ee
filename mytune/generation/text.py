"""Text of new tokens, as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mytune.generation.decoding import Decoding, Row
from mytune.modules.decoder import Decoder
from mytune.tokenizers.base import ModelTokenizer, StreamDecoder


class TextStream:
    """Text of tokens that come one by one, up to the first of some stop strings.

    What may be the beginning of a stop string is held back until it is known.

    Args:
        decoder: turns ids into text.
        stop: the strings before which the text ends; empty ones are not allowed.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop = decoder, stop
        self._held = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """Take the next token and return the text that is now certain (often empty)."""
        return "" if self.stopped else self._add(self._decoder.put(token))

    def flush(self) -> str:
        """Return what was held back, at the end of the tokens."""
        text = "" if self.stopped else self._add(self._decoder.flush())
        held, self._held = self._held, ""
        return text + held

    def _add(self, text: str) -> str:
        text = self._held + text
        found = [at for each in self._stop if (at := text.find(each)) >= 0]
        if found:
            self._held, self.stopped = "", True
            return text[: min(found)]
        begun = max((_begun(text, each) for each in self._stop), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def stop_ids(tokenizer: ModelTokenizer, stop: Sequence[str] = ()) -> list[int]:
    """Return the ids that end an answer: the tokenizer's, and special tokens that `stop` names.

    Special tokens are left out of an answer's text, where no stop string would find them.
    """
    names = tokenizer.special_tokens
    return [*tokenizer.stop_tokens, *(names[each] for each in stop if each in names)]


@dataclass(frozen=True)
class Completion:
    """What continues a prompt: its text, and the row of tokens that it comes from.

    The text ends before a stop string; the tokens go on to where that was complete.
    """

    text: str
    row: Row


def complete(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    tokenizer: ModelTokenizer,
    *,
    stop: Sequence[str] = (),
    **settings: Any,
) -> list[Completion]:
    """Continue prompts together, each until it ends by itself or says one of `stop`.

    `settings` are those of `Decoding`, which says what is raised, too; there are `num_samples`
    completions for each prompt, side by side.
    """
    decoding = Decoding(model, prompts, stop_tokens=stop_ids(tokenizer, stop), **settings)
    streams = [TextStream(tokenizer.stream_decoder(), stop) for _ in decoding.rows]
    texts = [""] * len(streams)
    for step in decoding:
        for number, token in enumerate(step):
            if token is not None:
                texts[number] += streams[number].put(token)
                if streams[number].stopped:
                    decoding.stop(number)
    pairs = zip(texts, streams, decoding.rows, strict=True)
    return [Completion(text + stream.flush(), row) for text, stream, row in pairs]
