"""Hugging Face tokenizer files for checkpoints that have only Meta's tiktoken file.

transformers loads a tiktoken `tokenizer.model` that stands alone, but without its special tokens:
`<|eot_id|>` silently becomes text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from mytune.errors import CheckpointError
from mytune.tokenizers.files import TIKTOKEN, byte_alphabet, read_vocabulary
from mytune.tokenizers.llama3 import CHAT_TEMPLATE, PATTERN, SPECIAL_TOKENS
from mytune.training.checkpointing.files import read_json, to_json


def tokenizer_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what AutoTokenizer needs beside Llama 3's `tokenizer.model`, if it is not there."""
    models = [source / name for name in TIKTOKEN if (source / name).is_file()]
    config = source / "config.json"
    if not (models and config.is_file()) or (source / "tokenizer.json").is_file():
        return
    try:
        tokens = read_vocabulary(models[0], PATTERN).tokens
    except CheckpointError:  # SentencePiece, as in Llama 2: transformers reads that itself
        return
    said = read_json(config)
    if said.get("vocab_size") != len(tokens) + len(SPECIAL_TOKENS):
        return
    yield "tokenizer.json", _tokenizer_json(models[0])
    if not (source / "tokenizer_config.json").is_file():
        yield "tokenizer_config.json", to_json(_tokenizer_config(said, len(tokens)))


def _tokenizer_config(said: Mapping[str, Any], base: int) -> dict[str, Any]:
    ends = said.get("eos_token_id")
    end: Any = ends[-1] if isinstance(ends, list) and ends else ends
    names = dict(enumerate(SPECIAL_TOKENS, base))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": names.get(end, "<|end_of_text|>"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": said.get("max_position_embeddings", 8192),
        "chat_template": CHAT_TEMPLATE,
    }


@lru_cache(maxsize=1)
def _tokenizer_json(model: Path) -> bytes:
    """Return the `tokenizer.json` that gives a tiktoken file's ids (4 s for Llama 3's 128,000)."""
    tokens = read_vocabulary(model, PATTERN).tokens
    ranks = {token: rank for rank, token in tokens.items()}
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (text[left], text[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in sorted(
            ((token[:i], token[i:]) for i in range(1, len(token))),
            key=lambda pair: (ranks.get(pair[0], -1), ranks.get(pair[1], -1)),
        )
        if left in ranks and right in ranks
    ]
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, len(ranks))]
    )
    return tokenizer.to_str().encode()
