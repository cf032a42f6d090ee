"""Kept answers: known again for the same model and questions, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mytune.evaluation import KeptAnswers
from mytune.quantization import Int8WeightOnlyQuantizer, quantize_linears
from tests.hf import twins

BATCHES = [[0, 3], [1], [4, 2]]


def ask(folder, model, text="the question"):
    """Ask all batches; return those that the model had to answer."""
    answered = []

    def work(batch):
        answered.append(batch)
        return {i: (-i / 3, i > 1) if i else "a\ntext \x00 é \u2028" for i in batch}

    known = KeptAnswers(folder, model).remembering(work, lambda i: (i, text))
    assert [known(batch) for batch in BATCHES] == [work(batch) for batch in BATCHES]
    return answered[: -len(BATCHES)]


def test_the_same_is_not_asked_twice(tmp_path, caplog):
    caplog.set_level("INFO", logger="mytune")
    assert ask(tmp_path, twins()[0]) == BATCHES
    assert not caplog.text
    assert ask(tmp_path, twins()[0]) == []
    assert f"answers to 3 batches from an evaluation that was stopped ({tmp_path}" in caplog.text
    assert ask(tmp_path, twins()[0], "another") == BATCHES


class OwnNorm(nn.RMSNorm):
    """A class whose code is not mytune's."""


def change_a_weight(model):
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


CHANGES = {
    "weight": change_a_weight,
    "dtype": lambda model: model.bfloat16(),
    "quantized": lambda model: quantize_linears(model, Int8WeightOnlyQuantizer()),
    "code": lambda model: setattr(model.norm, "__class__", OwnNorm),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_asked_itself(tmp_path, change):
    ask(tmp_path, twins()[0])
    model, _ = twins()
    CHANGES[change](model)
    assert ask(tmp_path, model) == BATCHES
    assert ask(tmp_path, model) == []


def test_what_a_killed_process_left_unfinished_is_asked_again(tmp_path):
    ask(tmp_path, twins()[0])
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-7])
    assert ask(tmp_path, twins()[0]) == BATCHES[2:]
    assert ask(tmp_path, twins()[0]) == []
    file.write_text(file.read_text().replace("answers", "answer", 1) + "\n[3]\nnull")
    assert ask(tmp_path, twins()[0]) == BATCHES[:1]


def test_a_full_disk_ends_no_evaluation(tmp_path, caplog):
    (tmp_path / "evaluation_unfinished").write_text("in the way")
    assert ask(tmp_path, twins()[0]) == BATCHES
    assert caplog.text.count("cannot go on if it is stopped") == 1
