"""A real pretrained Llama gives the reference's ids, logits and loss, from both formats."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mytune.models.llama3 import llama3_tokenizer
from mytune.modules import LinearCrossEntropyLoss
from mytune.training import FullModelHFCheckpointer, FullModelMetaCheckpointer
from tests.hf import load

FORMATS = {"hf": FullModelHFCheckpointer, "meta": FullModelMetaCheckpointer}


@pytest.fixture(params=FORMATS)
def loaded(request, data_dir):
    folder = data_dir / "stories260K" / request.param
    return load(folder, reader=FORMATS[request.param]), llama3_tokenizer(str(folder))


@pytest.mark.data
def test_ids_and_logits_are_the_references(loaded, data_dir):
    model, tokenizer = loaded
    expected = json.loads((data_dir / "stories260K" / "EXPECTED.json").read_text())
    ids = tokenizer.encode(expected["prompt"], add_eos=False)
    assert ids == expected["prompt_ids"]
    with torch.no_grad():
        top = model(torch.tensor([ids]))[0, -1].topk(5)
    assert top.indices.tolist() == [index for index, _ in expected["last_logits_top5"]]
    for value, (_, reference) in zip(
        top.values.tolist(), expected["last_logits_top5"], strict=True
    ):
        assert value == pytest.approx(reference, abs=3e-5)


@pytest.mark.data
def test_the_loss_is_transformers_loss(loaded, data_dir):
    model, tokenizer = loaded
    expected = json.loads((data_dir / "stories260K" / "EXPECTED.json").read_text())
    tokens = torch.tensor([tokenizer.encode(expected["bos_greedy_200"], add_eos=False)])
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    with torch.no_grad():
        loss = LinearCrossEntropyLoss()(model, {"tokens": tokens, "labels": labels})
    theirs = AutoModelForCausalLM.from_pretrained(data_dir / "stories260K" / "hf")
    reference = theirs(tokens, labels=tokens).loss.item()
    assert loss.item() / (tokens.shape[1] - 1) == pytest.approx(reference, rel=1e-5)
    assert reference < 1.5  # it has learned to write: a fault would show
