"""Llama 3's tokenizer: special tokens, ids and chat format, exactly Meta's.

Sources: `models/llama3/tokenizer.py` of https://github.com/meta-llama/llama-models; `ChatFormat` of
https://github.com/meta-llama/llama3, which strips the content of messages.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from mytune.errors import CheckpointError, ConfigError
from mytune.tokenizers.base import StreamDecoder
from mytune.tokenizers.files import (
    Vocabulary,
    find_tokenizer,
    read_special_tokens,
    read_vocabulary,
)
from mytune.tokenizers.messages import ROLES, Message
from mytune.tokenizers.templates import ApplyTemplate, TemplateSpec, resolve_template

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids, which follow the last token of a tiktoken file. In Llama 3 before
# 3.1 the same ids are there, some of them still under a reserved name.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)

# The chat format, see `ChatFormat` of https://github.com/meta-llama/llama3.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# tiktoken overflows its stack on longer inputs; where Meta cuts them is part of the ids.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")


class Llama3Tokenizer:
    """Tokenizer of Llama 3, 3.1, 3.2 and 3.3.

    Args:
        path: a tiktoken `tokenizer.model`, a `tokenizer.json`, or a directory with one of them.
        max_seq_len: where datasets truncate; the tokenizer itself never does.
        special_tokens_path: a `tokenizer.json` whose special tokens replace the usual ones.
        prompt_template: dotted path of a template class, or role -> [prefix, suffix].

    Raises:
        ConfigError: there is no such file, or its special tokens are not Llama 3's.
        CheckpointError: the file is corrupt or of another kind.
    """

    def __init__(
        self,
        path: str | Path,
        max_seq_len: int | None = None,
        special_tokens_path: str | Path | None = None,
        prompt_template: TemplateSpec = None,
    ) -> None:
        if max_seq_len is not None and max_seq_len < 1:
            raise ConfigError(f"tokenizer.max_seq_len is {max_seq_len}; at least 1, or null")
        self._arguments = (path, max_seq_len, special_tokens_path, prompt_template)
        self.path = find_tokenizer(path)
        self.max_seq_len = max_seq_len
        vocabulary = read_vocabulary(self.path, PATTERN)
        self.special_tokens = _special_tokens(vocabulary, special_tokens_path)
        source = special_tokens_path or self.path
        _check_special_ids(self.special_tokens, vocabulary, source)
        id_of = partial(_find_id, self.special_tokens, source)
        self.bos_id = id_of("<|begin_of_text|>")
        self.eos_id = id_of("<|end_of_text|>")
        self.pad_id = id_of("<|finetune_right_pad_id|>")
        self.start_header_id = id_of("<|start_header_id|>")
        self.end_header_id = id_of("<|end_header_id|>")
        self.eom_id = id_of("<|eom_id|>")
        self.eot_id = id_of("<|eot_id|>")
        self.python_tag_id = id_of("<|python_tag|>")
        self.stop_tokens = [self.eos_id, self.eot_id, self.eom_id]
        self._encode = vocabulary.encode
        self._special_ids = frozenset(self.special_tokens.values())
        special_bytes = {i: name.encode() for name, i in self.special_tokens.items()}
        self._tokens = vocabulary.tokens | special_bytes
        self.vocab_size = max(self._tokens) + 1
        self._template = resolve_template(prompt_template)
        ours = type(self) is Llama3Tokenizer  # a subclass is somebody's code, which may change
        self.chat_template = CHAT_TEMPLATE if ours and not self._template else None
        self._headers = {role: self._header(role) for role in ROLES}
        print_of = partial(_fingerprint, vocabulary.digest, self.special_tokens)
        self.fingerprint = print_of(self._template, max_seq_len) if ours else None

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the ids of `text`; what looks like a special token in it is text."""
        ids = [self.bos_id] if add_bos else []
        for piece in _pieces(text):
            ids += self._encode(piece)
        if add_eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`, with U+FFFD where they are not UTF-8.

        Raises:
            CheckpointError: an id is not in the vocabulary.
        """
        token_bytes = self._text_bytes if skip_special_tokens else self._token_bytes
        return b"".join(map(token_bytes, ids)).decode("utf-8", errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder for the ids of one answer, special tokens left out."""
        return StreamDecoder(self._text_bytes)

    def tokenize_messages(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and, for each, True if it is masked (not trained).

        What is trained of a message that is not masked is its content and its end token, never its
        header. `add_generation_prompt` appends the header of the assistant's answer.
        """
        tokens, mask = [self.bos_id], [True]
        for message in self._template(messages) if self._template else messages:
            header, body = self._headers[message.role], self._body(message)
            tokens += header + body
            mask += [True] * len(header) + [message.masked] * len(body)
        if add_generation_prompt:
            header = self._headers["assistant"]
            tokens += header
            mask += [True] * len(header)
        return tokens, mask

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a call: a `tokenizers.Tokenizer` forgets that special tokens are text."""
        return type(self), self._arguments

    def _header(self, role: str) -> list[int]:
        name, newlines = (self.encode(text, False, False) for text in (role, "\n\n"))
        return [self.start_header_id, *name, self.end_header_id, *newlines]

    def _body(self, message: Message) -> list[int]:
        tag = [self.python_tag_id] if message.ipython else []
        waits = message.role == "assistant" and not message.eot
        end = self.eom_id if waits else self.eot_id
        return [*tag, *self.encode(message.content.strip(), False, False), end]

    def _token_bytes(self, token_id: int) -> bytes:
        try:
            return self._tokens[token_id]
        except KeyError as error:
            raise CheckpointError(
                f"token id {token_id} is not among the {self.vocab_size} of {self.path}: "
                "model and tokenizer do not belong together; change tokenizer.path"
            ) from error

    def _text_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self._token_bytes(token_id)


llama3_tokenizer = Llama3Tokenizer  # the name that configs know


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` where Meta does: every 400,000 characters, and in runs with or without spaces."""
    if len(text) <= _MAX_RUN:
        yield text
        return
    for start in range(0, len(text), _MAX_CHARS):
        chunk = text[start : start + _MAX_CHARS]
        cuts = [0, *_cuts_in_runs(chunk), len(chunk)]
        yield from (chunk[a:b] for a, b in pairwise(cuts))


def _cuts_in_runs(chunk: str) -> Iterator[int]:
    for run in _RUNS.finditer(chunk):
        yield from range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)


def _special_tokens(vocabulary: Vocabulary, path: str | Path | None) -> dict[str, int]:
    if path:
        return read_special_tokens(path)
    if vocabulary.special_tokens is not None:
        return vocabulary.special_tokens
    return {name: i for i, name in enumerate(SPECIAL_TOKENS, len(vocabulary.tokens))}


def _check_special_ids(
    special: Mapping[str, int], vocabulary: Vocabulary, source: str | Path
) -> None:
    """Raise ConfigError for special tokens with the id of a word, of each other, or below zero."""
    uses = Counter(special.values())
    problems = [
        f"{name} has id {i}, which is negative or taken"
        for name, i in special.items()
        if i < 0 or i in vocabulary.tokens or uses[i] > 1
    ]
    if problems:
        raise ConfigError(f"special tokens of {source} do not fit the tokenizer:", problems)


def _find_id(special: Mapping[str, int], source: str | Path, name: str) -> int:
    """Return the id of a special token, also where Llama 3 before 3.1 calls it reserved."""
    if name in special:
        return special[name]
    reserved = {i for held, i in special.items() if held.startswith("<|reserved_special_token_")}
    first = special.get(SPECIAL_TOKENS[0])
    if first is not None and (place := first + SPECIAL_TOKENS.index(name)) in reserved:
        return place
    raise ConfigError(
        f"{source} has no special token {name}, which Llama 3's chat format needs; "
        "change tokenizer.path or tokenizer.special_tokens_path"
    )


def _fingerprint(
    digest: str, special: Mapping[str, int], template: ApplyTemplate | None, limit: int | None
) -> str | None:
    if template is not None and not type(template).__module__.startswith("mytune."):
        return None  # somebody's code, which may change
    around = getattr(template, "template", None)
    settings = json.dumps([digest, special, around, limit], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()
