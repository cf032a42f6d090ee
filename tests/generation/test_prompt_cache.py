"""What has been read is not read again, and changes nothing."""

from __future__ import annotations

import pytest
import torch

from mytune.errors import ConfigError
from mytune.generation import Decoding, PromptCache, generate
from mytune.generation import decoding as decoding_loop
from mytune.generation.reading import StaticReader
from tests.generation.conftest import VARIED
from tests.hf import twins


def continued(model, prompt, count, **settings):
    return list(generate(model, prompt, max_new_tokens=count, **settings))


@pytest.mark.parametrize("static", [False, True])
def test_a_conversation_reads_only_what_is_new(static):
    model, _ = twins(**VARIED)
    cache = PromptCache(model, 120)
    if static:
        cache.reader = StaticReader(model, cache.reader.cache)
    forwards = []
    model.layers[0].register_forward_hook(lambda _, args, out: forwards.append(args[0].shape[1]))
    prompt = [1, 5, 9, 7]
    for question in ([20, 21, 22], [30], [40, 41, 42, 43, 44]):
        prompt += question
        expected = continued(model, prompt, 10)
        forwards.clear()
        answer = continued(model, prompt, 10, prompt_cache=cache)
        assert answer == expected
        # The answer's last token has not been read yet.
        assert forwards == [len(question) + (4 if len(prompt) == 7 else 1)] + [1] * 9
        prompt += answer


def test_reading_ahead_of_a_stop_token_spoils_nothing(monkeypatch):
    model, _ = twins(**VARIED)
    stop = continued(model, [1, 5, 9, 7], 20)[8]
    told = [continued(model, [1, 5, 9, 7, *end], 20, stop_tokens=[stop]) for end in ([], [3], [4])]
    monkeypatch.setattr(decoding_loop, "_reads_ahead", lambda device: True)
    cache = PromptCache(model, 100)
    for end, expected in zip(([], [3], [4]), told, strict=True):
        prompt = [1, 5, 9, 7, *end]
        assert continued(model, prompt, 20, stop_tokens=[stop], prompt_cache=cache) == expected


def test_what_differs_is_read_again():
    model, _ = twins(**VARIED)
    cache = PromptCache(model, 100)
    continued(model, [1, 5, 9, 7], 20, prompt_cache=cache)
    assert cache.reader.cache.filled == 4 + 19
    for prompt in ([1, 5, 8, 7, 3], [1], [1, 5, 8, 7, 3], [1, 5, 8, 7]):
        assert continued(model, prompt, 20, prompt_cache=cache) == continued(model, prompt, 20)


def test_an_answer_that_was_broken_off_spoils_nothing():
    model, _ = twins(**VARIED)
    cache = PromptCache(model, 100)

    class Stop(Exception):
        pass

    def interrupt(module, args, out):
        if cache.reader.cache.filled == 8:
            raise Stop

    handle = model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(Stop):
        continued(model, [1, 5, 9, 7], 20, prompt_cache=cache)
    handle.remove()
    prompt = [1, 5, 9, 7, *continued(model, [1, 5, 9, 7], 20)]
    assert continued(model, prompt, 20, prompt_cache=cache) == continued(model, prompt, 20)


def test_the_text_ends_where_the_cache_does():
    model, _ = twins()
    cache = PromptCache(model, 30)
    decoding = Decoding(model, [[1] * 20], max_new_tokens=50, prompt_cache=cache)
    assert len(list(decoding)) == 10
    assert decoding.rows[0].ended == "length"
    with pytest.raises(ConfigError, match=r"30 tokens.*cache's 30 positions"):
        Decoding(model, [[1] * 30], max_new_tokens=50, prompt_cache=cache)


def test_a_prompt_cache_is_of_one_row():
    model, _ = twins()
    for arguments in ({"prompts": [[1], [2]]}, {"prompts": [[1]], "num_samples": 2}):
        with pytest.raises(ConfigError, match="one row"):
            Decoding(model, max_new_tokens=5, prompt_cache=PromptCache(model, 30), **arguments)


def test_only_the_penalty_needs_to_know_what_was_said():
    model, _ = twins(**VARIED)
    cache = PromptCache(model, 100)
    prompt = [1, 5, 9, 7, *continued(model, [1, 5, 9, 7], 20, prompt_cache=cache), 3]
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    how = {"temperature": 1.0, "repetition_penalty": 1.5}
    first = continued(model, prompt, 20, prompt_cache=cache, generator=seeds[0], **how)
    assert first == continued(model, prompt, 20, generator=seeds[1], **how)
