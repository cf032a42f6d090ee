"""The recipe trains as a plain loop over the Hugging Face model, however batches are cut."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mytune.models.llama3 import llama3_tokenizer
from mytune.tokenizers import Message
from tests.recipes.conftest import LEVERS, LORA, assert_same_curve, curve

RELATIVE = 1e-5


def plain_loop(model, checkpoint, rows, steps, rows_per_step=8):
    """Train row by row, in the order of the file, over and over; return loss and gradient norm."""
    tokenizer = llama3_tokenizer(str(checkpoint / "tokenizer.model"))
    samples = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        turns = [Message("user", row["input"], masked=True), Message("assistant", row["output"])]
        tokens, mask = tokenizer.tokenize_messages(turns)
        labels = [-100 if masked else token for token, masked in zip(tokens, mask, strict=True)]
        samples.append((torch.tensor([tokens]), torch.tensor(labels[1:])))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    result = []
    for step in range(steps):
        at = step * rows_per_step % len(samples)
        batch = samples[at : at + rows_per_step]
        count = sum((labels != -100).sum() for _, labels in batch)
        total = 0.0
        for tokens, labels in batch:
            logits = model(tokens).logits[0, :-1]
            if (labels != -100).any():
                loss = F.cross_entropy(logits, labels, reduction="sum") / count
                loss.backward()
                total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        result.append((total, norm.item()))
    return result


def assert_plain_loops(metrics, expected):
    for got, (loss, norm) in zip(metrics, expected, strict=True):
        assert got["loss"] == pytest.approx(loss, rel=RELATIVE)
        assert got["grad_norm"] == pytest.approx(norm, rel=RELATIVE)


def test_full_fine_tuning_is_a_plain_loop(run, config, checkpoint, rows):
    metrics = run(config, "shuffle=False", "epochs=4")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = plain_loop(model, checkpoint, rows, 20)
    assert_plain_loops(metrics, expected)
    saved = load_file(f"{config['output_dir']}/epoch_3/model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.data, rtol=0, atol=1e-4)
    assert expected[-1][0] < expected[0][0]


def test_lora_is_pefts_lora(run, config, checkpoint, rows, monkeypatch):
    metrics = run({**config, "model": LORA}, "shuffle=False", "epochs=4", "optimizer.lr=1e-3")
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    start = run(
        {**config, "model": LORA},
        "output_dir=" + config["output_dir"] + "_start",
        "optimizer.lr=0",
        "max_steps_per_epoch=1",
    )
    assert len(start) == 1
    folder = config["output_dir"] + "_start/epoch_0/adapter"
    oracle = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    assert_plain_loops(metrics, plain_loop(oracle, checkpoint, rows, 20))


CUTS = [(1, 8), (2, 4), (4, 2), (8, 1)]


@pytest.mark.parametrize("model", ["full", "lora"])
def test_gradient_accumulation_changes_nothing(run, config, model):
    """Rows have unequal lengths and two of them nothing to train."""
    first, *others = [
        run(
            {**config, "model": LORA if model == "lora" else config["model"]},
            f"batch_size={size}",
            f"gradient_accumulation_steps={times}",
            f"output_dir={config['output_dir']}_{size}",
            "max_steps_per_epoch=3",
        )
        for size, times in CUTS
    ]
    for other in others:
        assert_same_curve(first, other)


def test_packed_rows_train_as_unpacked_ones(run, config):
    """All rows in one step, so that packing cannot change which rows a step has."""
    everything = ("batch_size=40", "gradient_accumulation_steps=1", "epochs=3")
    plain = run(config, *everything)
    packed = run(
        config, *everything, "dataset.packed=True", f"output_dir={config['output_dir']}_packed"
    )
    assert_same_curve(plain, packed, rel=2e-6)


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_nothing(run, config, lever):
    override, tolerance = LEVERS[lever]
    config = {**config, "model": {**LORA, "lora_dropout": 0.1}} if lever != "compile" else config
    plain = run(config, "max_steps_per_epoch=3")
    other = run(
        config, "max_steps_per_epoch=3", override, f"output_dir={config['output_dir']}_other"
    )
    assert_same_curve(plain, other, rel=tolerance)


def test_the_seed_decides_order_dropout_and_adapters(run, config):
    config = {**config, "model": {**LORA, "lora_dropout": 0.1}}
    curves = [
        curve(run(config, f"seed={seed}", f"output_dir={config['output_dir']}_{i}"))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]
