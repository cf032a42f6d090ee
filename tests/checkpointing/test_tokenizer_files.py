"""A published directory's tokenizer works in transformers, with its special tokens."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mytune.tokenizers.llama3 import Llama3Tokenizer
from mytune.tokenizers.messages import Message
from mytune.training.checkpointing.checkpointers import FullModelHFCheckpointer
from mytune.training.checkpointing.tokenizer_files import tokenizer_files

TEXTS = (
    " Once upon a time, there was a dog",
    "Héllo   wörld\n\n\n 12345 don't 日本語 🤗 \t x",
    "aaa aaaa aaaaa abab\x00",
)


def write_tiktoken(folder: Path, tokens: int) -> None:
    """Write a tokenizer of bytes and a few merges, and a config.json that goes with it."""
    merged = [b"aa", b"ab", b" a", b"aaa", b"he", b" on", b"ce", b"\n\n", b" the", b"aab"]
    words = [*(bytes([byte]) for byte in range(256)), *merged]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(words)]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_text("\n".join(lines))
    config = {"model_type": "llama", "vocab_size": tokens, "eos_token_id": [267, 275]}
    (folder / "config.json").write_text(json.dumps(config))


def agree(folder: Path) -> Any:
    """Check that transformers gives our ids; return its tokenizer."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Llama3Tokenizer(folder / "tokenizer.model")
    for text in TEXTS:
        ids = ours.encode(text, add_eos=False)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    chat = [("system", "be kind "), ("user", " hello"), ("assistant", "a")]
    for turns, prompt in ((chat, False), (chat[:2], True)):
        ids = theirs.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns],
            return_dict=False,
            add_generation_prompt=prompt,
        )
        messages = [Message(role=role, content=text) for role, text in turns]  # type: ignore[arg-type]
        assert ids == ours.tokenize_messages(messages, add_generation_prompt=prompt)[0]
    return theirs


def test_a_tiktoken_file_alone_gets_hugging_face_files_with_its_special_tokens(
    tmp_path: Path,
) -> None:
    write_tiktoken(tmp_path, 266 + 256)
    for name, content in tokenizer_files(tmp_path):
        (tmp_path / name).write_bytes(content)
    assert agree(tmp_path).eos_token == "<|eot_id|>"


def test_metas_folder_below_is_looked_into(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, 266 + 256)
    beside = dict(tokenizer_files(tmp_path))
    (tmp_path / "original").mkdir()
    (tmp_path / "tokenizer.model").rename(tmp_path / "original" / "tokenizer.model")
    assert dict(tokenizer_files(tmp_path)) == beside and len(beside) == 2


@pytest.mark.parametrize("there", ["tokenizer.json", "other vocabulary", "SentencePiece"])
def test_other_tokenizers_are_left_as_they_are(there: str, tmp_path: Path) -> None:
    write_tiktoken(tmp_path, 999 if there == "other vocabulary" else 266 + 256)
    if there == "tokenizer.json":
        (tmp_path / there).write_text("{}")
    if there == "SentencePiece":
        (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert list(tokenizer_files(tmp_path)) == []


@pytest.mark.data
def test_a_published_directory_gives_its_tokenizer_to_transformers(
    data_dir: Path, tmp_path: Path
) -> None:
    from mytune.models.auto import sizes_of_checkpoint

    folder = str(data_dir / "stories260K" / "hf")
    checkpointer = FullModelHFCheckpointer(folder, output_dir=str(tmp_path))
    config = sizes_of_checkpoint(folder)
    weights = checkpointer.weights(config)
    saved = checkpointer.save(
        "epoch_0", step=1, dtype=torch.float32, weights=weights, config=config
    )
    assert agree(saved).bos_token_id == 512
