"""Text comes as soon as it is certain, and ends before a stop string."""

from __future__ import annotations

import pytest
import torch

from mytune.generation import TextStream, complete, generate, generate_batch
from mytune.tokenizers import StreamDecoder
from tests.generation.conftest import VARIED
from tests.hf import twins


class Bytes:
    """A tokenizer whose ids are bytes."""

    stop_tokens: tuple[int, ...] = (0,)

    def __init__(self, **special_tokens: int) -> None:
        self.special_tokens = special_tokens

    def stream_decoder(self):
        return StreamDecoder(lambda token: bytes([token]))


def pieces(text, stop):
    stream = TextStream(Bytes().stream_decoder(), stop)
    return [*(stream.put(byte) for byte in text.encode()), stream.flush()], stream.stopped


def test_text_comes_as_it_is_certain():
    assert pieces("né!", []) == (["n", "", "é", "!", ""], False)
    assert pieces("a\nb\n\nc", ["\n\n"]) == (["a", "", "\nb", "", "", "", ""], True)
    assert pieces("a\n", ["\n\n"]) == (["a", "", "\n"], False)
    assert pieces("aaab", ["aab"]) == (["", "", "a", "", ""], True)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["one"], ""),
        ("one two thr", ["three"], "one two thr"),
        ("ab", ["abc", "b"], "a"),
        ("naïve", ["ï"], "na"),
        ("", ["x"], ""),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stop, expected):
    found, stopped = pieces(text, stop)
    assert "".join(found) == expected
    assert stopped == (text != expected)


def test_completions_are_cut_at_stop_strings_and_their_rows_end_there():
    model, _ = twins(**VARIED, vocab_size=200)
    prompts = [[1, 5, 9], [1, 80, 3], [7]]
    endless = generate_batch(model, prompts, max_new_tokens=60, stop_tokens=[0])
    texts = [bytes(row).decode(errors="replace") for row in endless]
    stop = texts[0][20:23]
    forwards = []
    model.register_forward_hook(lambda module, args, out: forwards.append(args[0].shape))
    found = complete(model, prompts, Bytes(), stop=[stop], max_new_tokens=60)
    assert [each.text for each in found] == [text.partition(stop)[0] for text in texts]
    assert found[0].row.ended == "stop"
    assert len(found[0].row.tokens) < 60
    most = len(found[0].row.tokens)  # the last one allowed completes the stop string
    last = complete(model, prompts[:1], Bytes(), stop=[stop], max_new_tokens=most)
    assert (last[0].text, last[0].row.ended) == (found[0].text, "stop")
    alone = complete(model, prompts[:1], Bytes(), stop=[stop], max_new_tokens=60)
    assert (
        alone[0].row.tokens == found[0].row.tokens == list(endless[0])[: len(found[0].row.tokens)]
    )


def test_a_special_token_that_is_named_ends_an_answer():
    model, _ = twins(**VARIED, vocab_size=200)
    endless = generate_batch(model, [[1, 5, 9]], max_new_tokens=60, stop_tokens=[0])[0]
    tokenizer = Bytes(tag=endless[20])
    (found,) = complete(model, [[1, 5, 9]], tokenizer, stop=["tag"], max_new_tokens=60)
    assert found.row.tokens == endless[: endless.index(endless[20])]
    assert found.row.ended == "stop"


def test_completions_of_samples_stand_side_by_side():
    model, _ = twins(**VARIED, vocab_size=200)
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    settings = {"max_new_tokens": 20, "num_samples": 3, "temperature": 1.0}
    prompts = [[1, 5], [9]]
    found = complete(model, prompts, Bytes(), generator=seeds[0], **settings)
    rows = generate_batch(model, prompts, generator=seeds[1], stop_tokens=[0], **settings)
    assert [each.row.tokens for each in found] == rows
    assert list(generate(model, prompts[1], max_new_tokens=3)) != rows[0][:3]
