"""Llama 3's tokenizer: special tokens, ids and chat format, exactly Meta's.

Source: Meta's reference, https://github.com/meta-llama/llama-models (`models/llama3/tokenizer.py`), and the dialog
format of https://github.com/meta-llama/llama3 (`ChatFormat`, which strips the content of messages).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mytune.errors import CheckpointError, ConfigError
from mytune.tokenizers.base import StreamDecoder
from mytune.tokenizers.files import find_tokenizer, read_special_tokens, read_vocabulary
from mytune.tokenizers.messages import ROLES, Message
from mytune.tokenizers.templates import TemplateSpec, prompt_template

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids, which follow the last token of the file. Llama 3 (before 3.1) has the same ids and calls
# some of them reserved.
_NAMED = (
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
)
SPECIAL_TOKENS = _NAMED + tuple(f"<|reserved_special_token_{i}|>" for i in range(2, 246))

# tiktoken overflows its stack on longer inputs; where Meta cuts them is part of the ids.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")


class Llama3Tokenizer:
    """Tokenizer of Llama 3, 3.1, 3.2 and 3.3.

    Args:
        path: a tiktoken `tokenizer.model`, a `tokenizer.json`, or a directory that has one of them.
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
        self._arguments = (path, max_seq_len, special_tokens_path, prompt_template)
        self.path = find_tokenizer(path)
        self.max_seq_len = max_seq_len
        vocabulary = read_vocabulary(self.path, PATTERN)
        self._encode = vocabulary.encode
        base = len(vocabulary.tokens)
        self.special_tokens = (
            read_special_tokens(special_tokens_path)
            if special_tokens_path
            else vocabulary.special_tokens or {name: base + i for i, name in enumerate(SPECIAL_TOKENS)}
        )
        self._special_ids = frozenset(self.special_tokens.values())
        _check_special_tokens(special_tokens_path or self.path, self.special_tokens, vocabulary.tokens)
        self._tokens = vocabulary.tokens | {i: name.encode() for name, i in self.special_tokens.items()}
        self._template = _resolve_template(prompt_template)
        self._name_special_tokens()
        self.vocab_size = max(self._tokens) + 1
        self.fingerprint = self._fingerprint(vocabulary.digest)
        self._headers = {role: self._header(role) for role in ROLES}
