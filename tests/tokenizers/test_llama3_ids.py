"""Ids are exactly Meta's from either kind of file, and decode to the same text."""

from __future__ import annotations

import base64
import json
import pickle
import random
from pathlib import Path

import pytest
import tiktoken

from mytune.tokenizers import Llama3Tokenizer
from mytune.tokenizers.llama3 import PATTERN, SPECIAL_TOKENS

BACKENDS = [
    "tiny",
    "tiny_json",
    pytest.param("llama3", marks=pytest.mark.data),
    pytest.param("llama3_json", marks=pytest.mark.data),
]
LOOK_ALIKES = "a<|eot_id|>b <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
SAMPLES = [
    "",
    " ",
    "This is a test sentence.",
    "It's  WE'LL  I'm 1234567 3.14\t\r\n\r\n  x\n \n",
    "naïve café — “quotes” … ½ ⅔ Ⅷ ٣٤٥ ǅ",
    "日本語のテキスト 中文字符 한국어 हिन्दी ภาษาไทย العربية עברית",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 emoji🙂text",
    "e\u0301\u200b\u00a0\u3000\u2028\x85\x00\x1c\ufeff",
    "def f(x):\n    return  x  # ok\n\n\n\t\tdone" + " " * 70 + "\n" * 40,
    LOOK_ALIKES,
    "lone \ud800 surrogate \udc00 and \ud83d\ude00 pair",
]


def meta_encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Meta's published algorithm: blocks of 400,000 characters, cut after 25,000 of one kind."""
    ids: list[int] = []
    for start in range(0, len(text), 400_000):
        piece, length, kind = "", 0, None
        for character in text[start : start + 400_000]:
            length = length + 1 if character.isspace() == kind else 1
            kind = character.isspace()
            if length > 25_000:
                ids += encoding.encode(piece, disallowed_special=())
                piece, length = "", 1
            piece += character
        ids += encoding.encode(piece, disallowed_special=())
    return ids


def reference(path: Path) -> tiktoken.Encoding:
    pairs = [line.split() for line in path.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("m", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    alphabets = [
        "abc XYZ'stm\n\r\t 019.,!?",
        "<|>eotid_begin start_header",
        "".join(chr(c) for c in range(0x20, 0x2FF)),
        "".join(chr(c) for c in [*range(0x1F600, 0x1F650), *range(0x300, 0x370), 0x200D, 0xFE0F]),
        "".join(chr(rng.randrange(0xE000, 0x110000)) for _ in range(500)),
        "".join(chr(rng.randrange(0xD800)) for _ in range(500)),
    ]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(60))) for _ in range(count)]


@pytest.fixture
def tiny_json(tiny_json_file: Path) -> Llama3Tokenizer:
    return Llama3Tokenizer(tiny_json_file)


@pytest.fixture(params=BACKENDS)
def pair(request: pytest.FixtureRequest) -> tuple[Llama3Tokenizer, tiktoken.Encoding]:
    """A tokenizer and tiktoken's own encoding of the same ranks."""
    name = request.param
    file: Path = request.getfixturevalue(f"{name.removesuffix('_json')}_file")
    return request.getfixturevalue(name), reference(file)


def test_ids_equal_tiktokens(pair: tuple[Llama3Tokenizer, tiktoken.Encoding]) -> None:
    tokenizer, encoding = pair
    for text in SAMPLES + random_texts(600, seed=1):
        assert tokenizer.encode(text, False, False) == meta_encode(encoding, text), repr(text)


def test_ids_of_long_runs_equal_metas(pair: tuple[Llama3Tokenizer, tiktoken.Encoding]) -> None:
    tokenizer, encoding = pair
    texts = [
        "a" * 25_001,
        " " * 60_000 + "b" * 25_000 + "\n" * 25_003,
        "word " * 90_000,  # across 400,000 characters
        "x" * 399_990 + " " * 26_000,
        "é" * 25_005 + "\u3000" * 50_001,
    ]
    for text in texts:
        assert tokenizer.encode(text, False, False) == meta_encode(encoding, text), text[:10]


def test_cutting_a_run_changes_ids_so_the_long_run_test_can_fail(tiny: Llama3Tokenizer) -> None:
    text = "a " + "th" * 12_499 + "xthe"  # the cut falls inside "the"
    assert tiny.encode(text, False, False) != tiny._encode(text)


@pytest.mark.data
def test_real_text_has_the_same_ids_in_both_files(
    data_dir: Path, llama3: Llama3Tokenizer, llama3_json: Llama3Tokenizer, llama3_file: Path
) -> None:
    text = (data_dir / "text" / "input.txt").read_text()
    ids = llama3.encode(text, False, False)
    assert ids == meta_encode(reference(llama3_file), text)
    assert ids == llama3_json.encode(text, False, False)
    assert llama3.decode(ids) == text


@pytest.mark.data
def test_stories260k_prompt_ids(data_dir: Path) -> None:
    expected = json.loads((data_dir / "stories260K" / "EXPECTED.json").read_text())
    tokenizer = Llama3Tokenizer(data_dir / "stories260K" / "hf")
    assert tokenizer.encode(expected["prompt"], add_eos=False) == expected["prompt_ids"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eot_id) == (768, 512, 521)


def test_256_special_tokens_follow_the_files_own(tiny: Llama3Tokenizer, tiny_file: Path) -> None:
    base = len(tiny_file.read_bytes().splitlines())
    assert sorted(tiny.special_tokens.values()) == list(range(base, base + 256))


@pytest.mark.data
def test_special_ids_are_llama3s(llama3: Llama3Tokenizer) -> None:
    named = ["bos", "eos", "pad", "start_header", "end_header", "eom", "eot", "python_tag"]
    ids = [128000, 128001, 128004, 128006, 128007, 128008, 128009, 128010]
    assert [getattr(llama3, f"{name}_id") for name in named] == ids
    assert llama3.stop_tokens == [128001, 128009, 128008]
    assert (llama3.vocab_size, len(llama3.special_tokens)) == (128256, 256)


@pytest.mark.parametrize("name", BACKENDS)
def test_special_look_alikes_are_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Llama3Tokenizer = request.getfixturevalue(name)
    for text in [*SPECIAL_TOKENS, LOOK_ALIKES]:
        ids = tokenizer.encode(text, False, False)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text


def test_a_pickled_tokenizer_still_takes_look_alikes_for_text(tiny_json: Llama3Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tiny_json))
    assert copy.encode(LOOK_ALIKES) == tiny_json.encode(LOOK_ALIKES)
    assert copy.fingerprint == tiny_json.fingerprint


def test_bos_and_eos_are_added_once_on_request(
    pair: tuple[Llama3Tokenizer, tiktoken.Encoding],
) -> None:
    tokenizer, _ = pair
    bare = tokenizer.encode("the user", False, False)
    assert tokenizer.encode("the user") == [tokenizer.bos_id, *bare, tokenizer.eos_id]
    assert tokenizer.encode("the user", add_eos=False) == [tokenizer.bos_id, *bare]


def test_truncation_and_padding_of_a_json_file_are_ignored(
    tiny_json_file: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_json_file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "the user is the user"
    expected = Llama3Tokenizer(tiny_json_file).encode(text)
    assert Llama3Tokenizer(tmp_path).encode(text) == expected


# --- decoding ---


def random_ids(tokenizer: Llama3Tokenizer, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    ranges = [
        range(tokenizer.vocab_size),
        range(256),
        range(tokenizer.bos_id, tokenizer.vocab_size),
    ]
    return [[rng.choice(rng.choice(ranges)) for _ in range(rng.randrange(40))] for _ in range(400)]


def test_streaming_equals_decoding_for_any_ids(
    pair: tuple[Llama3Tokenizer, tiktoken.Encoding],
) -> None:
    tokenizer, encoding = pair
    for ids in random_ids(tokenizer, seed=2):
        stream = tokenizer.stream_decoder()
        streamed = "".join([stream.put(i) for i in ids]) + stream.flush()
        assert streamed == tokenizer.decode(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == encoding.decode(ids)


def test_streaming_never_shows_half_a_character(tiny: Llama3Tokenizer) -> None:
    stream = tiny.stream_decoder()
    shown = [stream.put(i) for i in "a🙂b".encode()]  # one id per byte
    assert shown == ["a", "", "", "", "🙂", "b"]
    assert (stream.put(0xF0), stream.flush(), stream.flush()) == ("", "\ufffd", "")


def test_decoding_text_gives_it_back(pair: tuple[Llama3Tokenizer, tiktoken.Encoding]) -> None:
    tokenizer, _ = pair
    for text in SAMPLES[:-1] + random_texts(200, seed=3):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_subclass_is_somebodys_code_and_not_taken_for_the_same(tiny_file: Path) -> None:
    class Own(Llama3Tokenizer):
        pass

    assert Llama3Tokenizer(tiny_file).fingerprint == Llama3Tokenizer(tiny_file).fingerprint
    assert (Own(tiny_file).fingerprint, Own(tiny_file).chat_template) == (None, None)
