"""Kept answers: known again for the same model and questions, and for nothing else."""

from __future__ import annotations

from copy import copy

import torch
from torch import nn

from mytune.evaluation import KeptAnswers
from mytune.evaluation.continuing import Prompt, continue_prompts
from mytune.modules.lora import LoRAConfig, apply_lora
from mytune.quantization import (
    Int8DynActInt8WeightQuantizer,
    Int8WeightOnlyQuantizer,
    quantize_linears,
)
from tests.hf import twins

BATCHES = [[0, 3], [1], [4, 2]]


def ask(folder, model, text="the question", recipe=__file__):
    """Ask all batches; return those that the model had to answer."""
    answered = []

    def work(batch):
        answered.append(batch)
        return {i: (-i / 3, i > 1) if i else "a\ntext \x00 é \u2028" for i in batch}

    known = KeptAnswers(folder, model, recipe).remembering(work, lambda i: (i, text))
    assert [known(batch) for batch in BATCHES] == [work(batch) for batch in BATCHES]
    return answered[: -len(BATCHES)]


def test_the_same_is_not_asked_twice(tmp_path, caplog):
    caplog.set_level("INFO", logger="mytune")
    assert ask(tmp_path, twins()[0]) == BATCHES
    assert not caplog.text
    assert ask(tmp_path, twins()[0]) == []
    assert f"answers to 3 batches are known, and are not asked for again: {tmp_path}" in caplog.text
    assert ask(tmp_path, twins()[0], "another") == BATCHES


class OwnNorm(nn.RMSNorm):
    """A class whose code is not mytune's."""


@torch.no_grad()
def change_a_weight(model):
    model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


@torch.no_grad()
def reverse_rows(model):
    weight = model.layers[1].attn.q_proj.weight
    weight.copy_(weight.flip(0))


@torch.no_grad()
def shift_the_storage(model):
    """The same model: its weight is a view of 2 bytes behind the beginning of what holds it."""
    norm = model.bfloat16().norm
    held = torch.cat((norm.weight[:1], norm.weight))
    norm.weight = nn.Parameter(held[1:])


def adapt(model, **settings):
    torch.manual_seed(1)
    apply_lora(model, LoRAConfig(rank=2, modules=("q_proj",), **{"alpha": 4, **settings}))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter.data)


CHANGES = [
    lambda model: None,
    change_a_weight,
    reverse_rows,
    lambda model: model.bfloat16(),
    lambda model: quantize_linears(model, Int8WeightOnlyQuantizer()),
    lambda model: quantize_linears(model, Int8DynActInt8WeightQuantizer()),
    adapt,
    lambda model: adapt(model, alpha=8),
    lambda model: adapt(model, use_rslora=True),
    lambda model: setattr(model.norm, "eps", 1e-4),
    lambda model: setattr(model.norm, "__class__", OwnNorm),
]


def changed(change):
    model, _ = twins()
    change(model)
    return model


def test_another_model_is_asked_itself(tmp_path):
    assert [ask(tmp_path, changed(change)) for change in CHANGES] == [BATCHES] * len(CHANGES)
    assert [ask(tmp_path, changed(change)) for change in CHANGES] == [[]] * len(CHANGES)
    assert ask(tmp_path, changed(shift_the_storage)) == []


def test_another_recipe_is_asked_itself(tmp_path):
    recipe = tmp_path / "my_eval.py"
    for text in ("first", "second"):
        recipe.write_text(text)
        assert ask(tmp_path, twins()[0], recipe=recipe) == BATCHES
        assert ask(tmp_path, twins()[0], recipe=recipe) == []


def test_texts_depend_on_how_a_tokenizer_ends_them(tmp_path, random_pair):
    model, texts = random_pair.model, []
    tokenizer = copy(random_pair.tokenizer)
    for stops in ([528], [528], range(512)):
        tokenizer.stop_tokens = list(stops)
        kept = KeptAnswers(tmp_path, model, __file__)
        texts += continue_prompts(model, tokenizer, [Prompt([5, 6], 9, [])], kept=kept)
    assert texts[0] == texts[1] != texts[2]


def test_a_tokenizer_of_ones_own_may_decode_otherwise_next_time(tmp_path, random_pair):
    tokenizer = copy(random_pair.tokenizer)
    tokenizer.fingerprint = None
    kept = KeptAnswers(tmp_path, random_pair.model, __file__)
    continue_prompts(random_pair.model, tokenizer, [Prompt([5, 6], 9, [])], kept=kept)
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_behind_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "evaluation_unfinished").symlink_to(tmp_path / "elsewhere")
    assert ask(tmp_path, twins()[0]) == ask(tmp_path, twins()[0]) == BATCHES
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_was_not_finished_or_is_damaged_is_asked_again(tmp_path):
    ask(tmp_path, twins()[0])
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-7])
    assert ask(tmp_path, twins()[0]) == BATCHES[2:]
    assert ask(tmp_path, twins()[0]) == []
    file.write_bytes(file.read_bytes().replace(b"false", b"true", 1) + b"\n\n\xff\x00[\n{}\n")
    assert ask(tmp_path, twins()[0]) == BATCHES[1:2]
    file.unlink()
    file.mkdir()
    assert ask(tmp_path, twins()[0]) == BATCHES


def test_a_full_disk_ends_no_evaluation(tmp_path, caplog):
    (tmp_path / "evaluation_unfinished").write_text("in the way")
    assert ask(tmp_path, twins()[0]) == BATCHES
    assert caplog.text.count("if this evaluation is stopped, it begins anew") == 1


def test_only_a_models_own_answers_are_removed(tmp_path):
    models = [changed(change) for change in CHANGES[:2]]
    for model in models:
        ask(tmp_path, model)
    KeptAnswers(tmp_path, models[0], __file__).remove()
    assert [ask(tmp_path, model) for model in models] == [BATCHES, []]
    for model in models:
        KeptAnswers(tmp_path, model, __file__).remove()
    assert not list(tmp_path.iterdir())
