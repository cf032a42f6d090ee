"""Trees: what sequences begin with alike is read once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from mytune.generation import Decoding, KVCache, generate
from mytune.generation.kv_cache import SharedPrefixKVCache
from mytune.generation.reading import CachedReader, StaticReader
from mytune.generation.trees import build_trees, stack
from tests.generation.conftest import sequences
from tests.hf import twins


@pytest.mark.parametrize("room", [1, 40, 1000])
def test_trees_hold_every_sequence_and_each_shared_token_once(room):
    wanted = sequences()
    trees = build_trees(wanted, room)
    found = {
        key: ([t.tokens[i] for i in path], [t.positions[i] for i in path])
        for t in trees
        for key, path in t.paths.items()
    }
    assert found == {i: (s, list(range(len(s)))) for i, s in enumerate(wanted)}
    assert [len(t) for t in trees] == sorted(map(len, trees), reverse=True)
    for tree in trees:
        assert {node for path in tree.paths.values() for node in path} == set(range(len(tree)))
        prefixes = {
            tuple(wanted[key][: i + 1]) for key in tree.paths for i in range(len(wanted[key]))
        }
        assert len(prefixes) == len(tree)
    assert sum(map(len, build_trees(wanted, 1000))) < sum(map(len, wanted)) / 2


def test_the_mask_shows_each_token_its_ancestors():
    trees = build_trees([[5, 6, 7], [5, 6, 8, 9], [5, 6, 8, 9, 4]], 100)
    tokens, positions, mask = stack(trees)
    assert tokens.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert positions.tolist() == [[0, 1, 2, 2, 3, 4]]
    seen = [{5}, {5, 6}, {5, 6, 7}, {5, 6, 8}, {5, 6, 8, 9}, {5, 6, 8, 9, 4}]
    assert [set(tokens[0][row].tolist()) for row in mask[0, 0]] == seen


def test_what_does_not_branch_needs_no_mask():
    assert stack(build_trees([[5, 6, 7], [8, 9]], 100))[2] is None


def test_prompts_that_begin_alike_are_continued_as_if_read_alone():
    model, _ = twins(initializer_range=0.2)
    prompts = [[*s, 7] for s in sequences(2)[:12]]
    decoding = Decoding(model, prompts, max_new_tokens=9)
    assert decoding._trees
    for _ in decoding:
        pass
    wanted = [list(generate(model, prompt, max_new_tokens=9)) for prompt in prompts]
    assert [row.tokens for row in decoding.rows] == wanted


def ends(*lengths):
    return [list(range(20, 20 + length)) for length in lengths]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("ends", [ends(5, 1, 9), ends(1, 1, 1), ends(4, 4, 4), ends(30, 1)])
def test_keys_of_a_long_common_beginning_are_kept_once(ends, samples):
    model, _ = twins(initializer_range=0.2, max_position_embeddings=512)
    common = [1 + i % 150 for i in range(300)]
    prompts = [common + end for end in ends]
    several = Decoding(model, prompts, max_new_tokens=9, logprobs=True, num_samples=samples)
    assert isinstance(several._reader.cache, SharedPrefixKVCache)
    for _ in several:
        pass
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    for prompt, row in zip(repeated, several.rows, strict=True):
        alone = Decoding(model, [prompt], max_new_tokens=9, logprobs=True)
        for _ in alone:
            pass
        assert row.tokens == alone.rows[0].tokens
        assert row.logprobs == pytest.approx(alone.rows[0].logprobs, abs=1e-5)


def test_a_static_step_goes_on_where_trees_end():
    model, _ = twins(initializer_range=0.2)
    rows = [[*range(3, 40), *end] for end in ([], [50], [51, 52, 53])]
    pads = torch.tensor([3, 2, 0])
    settings = dict(batch_size=3, length=60, device="cpu", dtype=torch.float32)
    found = []
    for kind in (StaticReader, CachedReader):
        reader = kind(model, KVCache(model.config, **settings), pads)
        reader.read_trees(build_trees(rows, 100))
        for token in (60, 61):
            logits = reader.read(torch.full((3, 1), token))
        found.append(logits)
    alone = [model(torch.tensor([[*row, 60, 61]]))[0, -1] for row in rows]
    for logits in found:
        torch.testing.assert_close(logits, torch.stack(alone), rtol=0, atol=1e-5)


def test_what_prompts_share_goes_through_the_model_once(monkeypatch):
    model, _ = twins()
    read = []
    model.embed_tokens.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape))
    shared = list(range(3, 43))
    list(Decoding(model, [[*shared, 50 + i] for i in range(4)], max_new_tokens=2))
    assert read == [(1, 40), (4, 1), (4, 1)]
    read.clear()
    list(Decoding(model, [[*range(i, 40)] for i in range(3, 7)], max_new_tokens=1))
    assert read == [(4, 37)]
