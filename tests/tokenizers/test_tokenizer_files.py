"""Where tokenizer files are found, what is read from them, what is said of a useless one."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from mytune.assets import ASSETS
from mytune.errors import CheckpointError, ConfigError, ResourceError, TuneError
from mytune.tokenizers import Llama3Tokenizer, check_vocabulary, llama3_tokenizer
from mytune.tokenizers.files import find_tokenizer
from mytune.tokenizers.llama3 import SPECIAL_TOKENS

NAMED = ["bos_id", "eos_id", "pad_id", "eom_id", "eot_id", "start_header_id", "python_tag_id"]


def copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target


def edited_json(source: Path, target: Path, names: list[str]) -> Path:
    """Write a tokenizer.json with other names for its special tokens."""
    content = json.loads(source.read_text())
    for token, name in zip(content["added_tokens"], names, strict=False):
        token["content"] = name
    content["added_tokens"] = content["added_tokens"][: len(names)]
    content["post_processor"] = None
    target.write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("place", ["tokenizer.model", "original/tokenizer.model", "tokenizer.json"])
def test_a_directory_is_searched(
    place: str, tiny_file: Path, tiny_json_file: Path, tmp_path: Path
) -> None:
    file = copy(tiny_json_file if place.endswith("json") else tiny_file, tmp_path / place)
    assert llama3_tokenizer(str(tmp_path)).path == file


def test_the_tiktoken_file_comes_first(
    tiny_file: Path, tiny_json_file: Path, tmp_path: Path
) -> None:
    copy(tiny_json_file, tmp_path / "tokenizer.json")
    file = copy(tiny_file, tmp_path / "original" / "tokenizer.model")
    assert Llama3Tokenizer(tmp_path).path == file


def test_the_content_not_the_name_says_the_kind(tiny_json_file: Path, tmp_path: Path) -> None:
    file = copy(tiny_json_file, tmp_path / "tokenizer.model")
    assert Llama3Tokenizer(file).encode("the") == Llama3Tokenizer(tiny_json_file).encode("the")


def test_llama_3_before_31_has_the_same_ids_under_reserved_names(
    tiny: Llama3Tokenizer, tiny_json_file: Path, tmp_path: Path
) -> None:
    names = list(SPECIAL_TOKENS)
    for number, place in enumerate([4, 5, 8, 10, 11], start=1000):
        names[place] = f"<|reserved_special_token_{number}|>"
    old = Llama3Tokenizer(edited_json(tiny_json_file, tmp_path / "tokenizer.json", names))
    assert [getattr(old, name) for name in NAMED] == [getattr(tiny, name) for name in NAMED]
    assert "<|eom_id|>" not in old.special_tokens


def test_special_tokens_path_replaces_names_and_ids(tiny_file: Path, tmp_path: Path) -> None:
    ids = {name: 900 - i for i, name in enumerate(SPECIAL_TOKENS)}
    special = tmp_path / "special.json"
    added = [{"content": name, "id": i} for name, i in ids.items()]
    special.write_text(json.dumps({"added_tokens": added}))
    tokenizer = Llama3Tokenizer(tiny_file, special_tokens_path=special)
    assert tokenizer.special_tokens == ids
    assert (tokenizer.bos_id, tokenizer.eot_id, tokenizer.vocab_size) == (900, 891, 901)
    assert tokenizer.decode([900], skip_special_tokens=False) == "<|begin_of_text|>"


def test_the_fingerprint_tells_tokenizers_apart(tiny_file: Path, tiny_json_file: Path) -> None:
    same = Llama3Tokenizer(tiny_file).fingerprint
    assert Llama3Tokenizer(str(tiny_file)).fingerprint == same
    others = [
        Llama3Tokenizer(tiny_json_file),
        Llama3Tokenizer(tiny_file, max_seq_len=5),
        Llama3Tokenizer(tiny_file, prompt_template={"user": ["Q: ", ""]}),
        Llama3Tokenizer(tiny_file, prompt_template={"user": ["", "Q: "]}),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 5
    assert Llama3Tokenizer(tiny_file, prompt_template=lambda messages: messages).fingerprint is None


# --- errors ---


def refusal(kind: type[TuneError], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        Llama3Tokenizer(*args, **kwargs)
    return str(caught.value)


def test_a_missing_file_is_answered_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    message = refusal(ConfigError, tmp_path / "tokenizer.model")
    assert "config.json" in message and "original/tokenizer.model" in message
    assert "tokenizer.path" in message and refusal(ConfigError, tmp_path).count("config.json") == 1
    assert "does not exist" in refusal(ConfigError, tmp_path / "nowhere" / "tokenizer.model")


def test_a_tokenizer_in_original_is_found_from_the_folder_above(
    tmp_path: Path, tiny_file: Path
) -> None:
    """Hugging Face's repositories keep Meta's file there, tutorials name it without."""
    there = copy(tiny_file, tmp_path / "original" / "tokenizer.model")
    assert find_tokenizer(tmp_path / "tokenizer.model") == there
    assert find_tokenizer(tmp_path) == there


LINES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>", "SentencePiece"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"", "is empty"),
        (b"\n".join([*LINES[:6], b"garbage", *LINES[7:]]), ":7 is b'garbage'"),
        (b"\n".join([*LINES[:6], b"Bg==x 6", *LINES[7:]]), ":7 is b'Bg==x 6'"),
        (b"\n".join([*LINES, LINES[3]]), ":257 repeats"),
        (b"\n".join([*LINES[:-1], b"/w== 300"]), ":256 has rank 300"),
        (b"\n".join(LINES[:-2]), "lacks tokens for 2 single bytes, the first 0xfe"),
        (b"\n".join([*LINES, b"QUFB" * 2000 + b" 256"]), "has a token of 6,000 bytes"),
        (b'{"model_type": "llama"}', "not a tokenizer.json"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_fault(
    content: bytes, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    message = refusal(CheckpointError, file)
    assert str(file) in message and said in message


def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({"<0x00>": 0, "▁a": 1}, [])).save(str(file))
    assert "byte-level" in refusal(CheckpointError, file)


def test_special_tokens_that_are_not_llama3s_are_refused(
    tiny_json_file: Path, tmp_path: Path
) -> None:
    for names in (["<|im_start|>", "<|im_end|>"], []):
        other = edited_json(tiny_json_file, tmp_path / "tokenizer.json", names)
        assert "no special token <|begin_of_text|>" in refusal(ConfigError, other)
    names = ["<|begin_of_text|>", *"abcdefghijk"]
    other = edited_json(tiny_json_file, tmp_path / "tokenizer.json", names)
    assert "no special token <|end_of_text|>" in refusal(ConfigError, other)


def test_special_tokens_must_not_share_ids(tiny_file: Path, tmp_path: Path) -> None:
    special = tmp_path / "special.json"
    entries = [
        ("<|begin_of_text|>", 5),
        ("<|end_of_text|>", 900),
        ("<|eot_id|>", 900),
        ("<|x|>", -1),
    ]
    special.write_text(json.dumps({"added_tokens": [{"content": n, "id": i} for n, i in entries]}))
    message = refusal(ConfigError, tiny_file, special_tokens_path=special)
    assert re.findall(r"<\|\w+\|> has id -?\d+", message) == [f"{n} has id {i}" for n, i in entries]


def test_a_special_tokens_file_without_special_tokens_is_refused(
    tiny_file: Path, tmp_path: Path
) -> None:
    for content in ("{}", "[]", "nonsense", '{"added_tokens": [{"id": 1}]}'):
        (tmp_path / "special.json").write_text(content)
        message = refusal(CheckpointError, tiny_file, special_tokens_path=tmp_path / "special.json")
        assert "special_tokens_path" in message
    missing = tmp_path / "no.json"
    message = refusal(ConfigError, tiny_file, special_tokens_path=missing)
    assert "special_tokens_path" in message
    assert "cannot read" in refusal(ResourceError, tiny_file, special_tokens_path=tmp_path)


def test_wrong_settings_are_refused(tiny_file: Path, tiny: Llama3Tokenizer) -> None:
    assert "max_seq_len" in refusal(ConfigError, tiny_file, max_seq_len=0)
    with pytest.raises(CheckpointError, match=f"token id {tiny.vocab_size} "):
        tiny.decode([tiny.vocab_size])


@pytest.mark.parametrize(("size", "word"), [(1.0, ""), (1.05, ""), (1.2, "of another family")])
def test_a_model_with_many_more_ids_than_the_tokenizer_is_told(caplog, size, word):
    tokenizer = llama3_tokenizer(str(ASSETS / "tiny"))
    check_vocabulary(tokenizer, int(size * tokenizer.vocab_size))
    assert bool(caplog.messages) == bool(word) and word in caplog.text
    with pytest.raises(ConfigError, match="and the model only"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)
