"""Tokenizer files for the tests: a tiny tiktoken file, and Hugging Face files made from one."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from mytune.tokenizers.llama3 import SPECIAL_TOKENS, Llama3Tokenizer

MERGES = [
    "th",
    "the",
    " t",
    " the",
    "\n\n",
    "us",
    "er",
    "user",
    "as",
    "ss",
    "is",
    "an",
    "éé",
    "  ",
    "    ",
    "\n\n\n",
]


def write_tiktoken(path: Path) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + [text.encode() for text in MERGES]
    # Every merge must be made of two tokens that come before it.
    tokens.insert(tokens.index("éé".encode()), "é".encode())
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def convert_to_json(tiktoken_file: Path, path: Path, special_tokens: list[str]) -> Path:
    """Make a tokenizer.json as transformers does, with a BOS template as Llama 3's own has."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(tiktoken_file), extra_special_tokens=special_tokens
    )
    tokenizer = converter.converted()
    bos = special_tokens[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tiny") / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny(tiny_file: Path) -> Llama3Tokenizer:
    return Llama3Tokenizer(tiny_file)


@pytest.fixture(scope="session")
def tiny_json_file(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny_json") / "tokenizer.json"
    return convert_to_json(tiny_file, path, list(SPECIAL_TOKENS))


@pytest.fixture(scope="session")
def llama3_file(data_dir: Path) -> Path:
    return data_dir / "llama3-tokenizer" / "tokenizer.model"


@pytest.fixture(scope="session")
def llama3(llama3_file: Path) -> Llama3Tokenizer:
    return Llama3Tokenizer(llama3_file)


@pytest.fixture(scope="session")
def llama3_json_file(llama3_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama3_json") / "tokenizer.json"
    return convert_to_json(llama3_file, path, list(SPECIAL_TOKENS))


@pytest.fixture(scope="session")
def llama3_json(llama3_json_file: Path) -> Llama3Tokenizer:
    return Llama3Tokenizer(llama3_json_file)
