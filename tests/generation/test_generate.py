"""What is generated is what the weights say, and it ends where it should."""

from __future__ import annotations

import pytest
import torch

from mytune.errors import ConfigError, NumericalError
from mytune.generation import generate, pack_linears
from mytune.generation.cpu_linear import HalfLinear, PackedLinear, fits_half, works
from mytune.generation.packing import Joined
from tests.generation.conftest import VARIED
from tests.hf import twins


def text_of(tokenizer, tokens):
    decoder = tokenizer.stream_decoder()
    return "".join(map(decoder.put, tokens)) + decoder.flush()


@pytest.mark.parametrize("packed", [False, True])
def test_greedy_stories_are_the_expected_ones(stories, expected, packed):
    model, tokenizer = stories
    if packed:
        pack_linears(model)
    prompt = tokenizer.encode(" " + expected["prompt"].strip(), add_eos=False)
    assert prompt == expected["prompt_ids"]
    greedy_60 = list(generate(model, prompt, max_new_tokens=60))
    assert text_of(tokenizer, greedy_60) == expected["greedy_60"]
    greedy_200 = list(generate(model, [tokenizer.bos_id], max_new_tokens=200))
    assert text_of(tokenizer, greedy_200) == expected["bos_greedy_200"]


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("packed", [False, True])
def test_greedy_equals_transformers(shape, packed):
    ours, theirs = twins(**VARIED, **shape)
    if packed:
        pack_linears(ours)
    prompt = [1, 5, 77, 20, 9]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=80, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    assert list(generate(ours, prompt, max_new_tokens=80)) == expected
    assert len(set(expected)) > 30


def rounded_twins(**sizes):
    """A model and a copy, with numbers of a checkpoint in bfloat16."""
    return [twins(**sizes)[0].bfloat16().float() for _ in range(2)]


def pack_for(capability, model, monkeypatch, dtype=torch.float32, rows=1):
    """Pack linears as for a CPU with AVX2, AVX-512, or AMX besides; count those of each kind."""
    if capability != "AVX2" and dtype is torch.bfloat16 and not works(PackedLinear, dtype):
        pytest.skip(f"this CPU has no packed linears in {dtype}")
    avx = "AVX512" if capability == "AMX" else capability
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: avx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": capability == "AMX"})
    pack_linears(model, rows)
    kinds = (PackedLinear, HalfLinear, Joined, torch.nn.Linear)
    return tuple(sum(type(module) is kind for module in model.modules()) for kind in kinds)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("capability", "dtype", "rows", "half"),
    [
        ("AVX2", torch.float32, 8, True),
        ("AVX2", torch.bfloat16, 8, True),
        ("AVX512", torch.float32, 8, True),
        ("AVX512", torch.bfloat16, 2, True),
        ("AVX512", torch.bfloat16, 3, False),
        ("AMX", torch.float32, 8, True),
        ("AMX", torch.bfloat16, 1, False),
    ],
)
def test_packed_linears_compute_the_same(capability, dtype, rows, half, tied, monkeypatch):
    plain, packed = rounded_twins(tie_word_embeddings=tied)
    packed.to(dtype)
    # In each of 3 blocks o and down, and the head; q, k and v are joined, and gate and up.
    kinds = (0, 3 * 4 + 1, 3 * 2, 0) if half else (3 * 7 + 1, 0, 0, 0)
    assert pack_for(capability, packed, monkeypatch, dtype, rows) == kinds
    tokens, x = torch.arange(20)[None], torch.randn(1, 3, 64, dtype=dtype)
    with torch.inference_mode():
        exact, ours, k = plain(tokens), packed(tokens), packed.layers[1].attn.k_proj(x)
        plain.to(dtype)
        error = (plain(tokens) - exact).norm()  # 0 in float32
        assert (ours - exact).norm() <= 1.2 * error + 1e-6 * exact.norm()
        torch.testing.assert_close(k, plain.layers[1].attn.k_proj(x))


def test_float32_that_is_no_rounded_bfloat16_is_not_kept_in_half(monkeypatch):
    model, _ = twins()
    assert pack_for("AVX2", model, monkeypatch) == (0, 0, 0, 3 * 7 + 1)
    model.layers[1].mlp.down_proj.weight.data.copy_(torch.ones(64, 96))
    model.layers[1].mlp.up_proj.weight.data.copy_(torch.ones(96, 64))  # but gate_proj is not fit
    assert pack_for("AVX2", model, monkeypatch) == (0, 2, 0, 3 * 7 + 1 - 2)


def test_weights_of_unlike_numbers_are_not_joined(monkeypatch):
    """As where a filter quantized some linears only."""
    packed, plain = rounded_twins()
    q_proj = packed.layers[1].attn.q_proj.weight

    def layout(weight, _):
        parts = (weight.detach(), torch.ones(len(weight)))
        return (Scaled, parts) if weight is q_proj else (Scaled, parts[:1])

    monkeypatch.setattr("mytune.generation.packing._joinable", layout)
    pack_linears(packed)
    assert sum(type(module) is Joined for module in packed.modules()) == 3 * 2 - 1
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(packed(tokens), plain(tokens))


class Scaled(torch.nn.Module):
    def __init__(self, weight, scale=None):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, x):
        return x @ self.weight.T * (1 if self.scale is None else self.scale)


@pytest.mark.parametrize("scale", [2.0**-100, 1e-9, 1.0, 2.0**100])
def test_numbers_of_any_size_fit_half_if_bfloat16_rounded_them(scale):
    weight = (torch.randn(700, 300) * scale).bfloat16()
    assert fits_half(weight)
    assert fits_half(weight.float())
    x = torch.randn(5, 300)
    expected = x @ weight.float().T
    assert (HalfLinear(weight)(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not fits_half(weight.float() * 1.001)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_damaged_weights_do_not_fit_half(odd):
    weight = torch.ones(8, 8)
    assert fits_half(weight)
    assert fits_half(torch.zeros(8, 8))
    weight[3, 4] = odd
    assert not fits_half(weight)


def test_a_stop_token_ends_the_text_and_is_not_part_of_it():
    model, _ = twins(**VARIED)
    endless = list(generate(model, [1, 2], max_new_tokens=50))
    stop = endless[20]
    first = endless.index(stop)
    assert list(generate(model, [1, 2], max_new_tokens=50, stop_tokens=[stop])) == endless[:first]


def test_a_seed_repeats_the_text_and_another_changes_it():
    model, _ = twins(**VARIED)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return list(
            generate(model, [1], max_new_tokens=40, temperature=1.0, top_k=50, generator=generator)
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_tokens_come_one_at_a_time():
    model, _ = twins()
    forwards = []
    model.register_forward_hook(lambda module, args, out: forwards.append(args[0].shape[1]))
    tokens = generate(model, [1, 2, 3], max_new_tokens=50)
    assert forwards == []
    next(tokens)
    assert forwards == [3]
    next(tokens)
    assert forwards == [3, 1]


def test_only_the_last_position_goes_through_the_head():
    model, _ = twins()
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[:-1]))
    next(generate(model, list(range(1, 90)), max_new_tokens=1))
    assert rows == [(1,)]


def test_the_text_ends_with_the_models_positions():
    model, _ = twins()
    assert len(list(generate(model, [1] * 100, max_new_tokens=300))) == 28


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([1] * 128, {}, "128 tokens.*128 positions"),
        ([], {}, "no tokens"),
        ([1, 160], {}, "token id 160.*vocabulary of 160"),
        ([1], {"top_k": 0}, "top_k is 0"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(prompt, settings, message):
    model, _ = twins()
    with pytest.raises(ConfigError, match=message):
        generate(model, prompt, **{"max_new_tokens": 5, **settings})


def test_logits_that_are_not_finite_are_an_error():
    model, _ = twins()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        next(generate(model, [1, 2], max_new_tokens=3))
