"""`tune run --dry-run`: what it says, what it leaves alone, and that its advice is right."""

from __future__ import annotations

import json
import os
import re

import pytest

from mytune.cli.main import main
from tests.recipes.conftest import LORA as LORA_MODEL
from tests.recipes.conftest import curve

LORA = ["run", "lora_finetune_single_device", "--config"]
TINY = [*LORA, "tiny/lora_single_device"]
LLAMA = [*LORA, "llama3/8B_lora_single_device"]
FULL = ["run", "full_finetune_single_device", "--config", "llama3/8B_full"]
ROWS = "tokenizer.max_seq_len=512"


def number(text, name):
    """Return the number in the line that begins with `name`."""
    return float(re.search(rf"^\s*{name}\s+([\d.,]+)", text, re.MULTILINE)[1].replace(",", ""))


def test_a_plan_says_what_a_run_goes_through_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    overrides = [f"output_dir={folder}", "epochs=2", "gradient_accumulation_steps=3"]
    assert main([*TINY, *overrides, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "1,240,960 parameters, 186,880 trained (15.06%)" in told
    assert "32 rows x 49 tokens x 3 micro-batches x 1 device = at most 4,704 tokens" in told
    assert "3,000 rows, 137,469 tokens, 22,383 trained in an epoch" in told
    assert re.search(r"^steps +64 in 2 epochs$", told, re.MULTILINE)  # of 96 rows, twice
    assert re.search(r"^time +unknown", told, re.MULTILINE)
    assert "It fits: " in told
    parts = ["weights", "adapters", "optimizer state", "gradients", "activations"]
    parts += ["logits and loss", "working memory"]
    total = sum(number(told, part) for part in parts)
    assert total == pytest.approx(number(told, "peak"), abs=0.05)
    assert number(told, "needed") == pytest.approx(
        number(told, "peak") + number(told, "reserve"), abs=0.02
    )
    assert not folder.exists()


def test_time_is_told_once_such_a_model_was_trained_there(tmp_path, capsys):
    summary = {"parameters": 1_240_960, "parameters_trained": 186_880}
    summary |= {"tokens_per_second": 2238.3, "world_size": 1}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main([*TINY, f"output_dir={tmp_path}", "epochs=3", "--dry-run"]) == 0
    assert "about 30 s at the speed of the last run there, 2,238 tr" in capsys.readouterr().out
    summary["parameters_trained"] = 1  # another model's
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main([*TINY, f"output_dir={tmp_path}", "--dry-run"]) == 0
    assert re.search(r"^time +unknown", capsys.readouterr().out, re.MULTILINE)


def test_without_weights_data_and_device_a_plan_says_what_it_does_not_know(capsys):
    assert main([*LLAMA, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "8,049,922,048 parameters, 19,660,800 trained (0.24%)" in said.out
    for name in ("data", "steps", "time"):
        assert re.search(rf"^{name} +unknown", said.out, re.MULTILINE)
    assert "rows of 2,048 tokens" in said.out
    assert "There is no cuda here" in said.out
    assert "checkpointer.checkpoint_dir: '/tmp/Meta-Llama-3-8B-Instruct' does not" in said.err
    assert 16 < number(said.out, "peak") < 18


@pytest.mark.parametrize(
    ("command", "gib", "change"),
    [
        (
            [*LLAMA, "enable_activation_checkpointing=False"],
            18,
            "enable_activation_checkpointing=True",
        ),
        (LLAMA, 12, "model._component_=mytune.models.llama3.qlora_llama3_8b"),
        (
            FULL,
            50,
            "optimizer._component_=torchao.optim.AdamW8bit ~optimizer.fused",
        ),
    ],
)
def test_what_does_not_fit_exits_5_and_fits_with_what_it_names(command, gib, change, capsys):
    command = [*command, ROWS, f"device_memory={gib}", "--dry-run"]
    assert main(command) == 5
    said = capsys.readouterr()
    assert f"of {gib}.00 GiB" in said.out
    assert f"error: the run does not fit; it would with {change}\n" in said.err
    assert main([*command, *change.split()]) == 0


def test_what_no_setting_makes_fit_needs_more_devices(capsys):
    assert main([*FULL, ROWS, "device_memory=20", "--dry-run"]) == 5
    error = capsys.readouterr().err
    ranks = int(re.search(r"it would on (\d+) devices that share the model", error)[1])
    many = ["run", "--nproc_per_node", str(ranks), "full_finetune_distributed", "--config"]
    assert main([*many, "llama3/8B_full", ROWS, "device_memory=20", "--dry-run"]) == 0


def test_torchruns_options_say_how_many_devices_there_are(capsys, monkeypatch):
    monkeypatch.setattr("torch.distributed.run.run", None)  # nothing is started
    before = dict(os.environ)
    many = ["run", "--nproc_per_node=4", "--nnodes", "2:3", "full_finetune_distributed"]
    sizes = ["device_memory=80", "tokenizer.max_seq_len=256", "--dry-run"]
    assert main([*many, "--config", "llama3/8B_full", *sizes]) == 0
    told = capsys.readouterr().out
    assert "2 rows x 256 tokens x 1 micro-batch x 8 devices = at most 4,096 tokens" in told
    assert "shared by 8 devices" in told
    assert number(told, "weights") == pytest.approx(14.96 / 8, abs=0.01)
    assert {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} == {
        k: v for k, v in before.items() if k != "OMP_NUM_THREADS"
    }


@pytest.mark.parametrize(("gib", "shared"), [(80, False), (12, True)])
def test_lora_is_shared_out_only_where_it_does_not_fit_whole(gib, shared, capsys):
    many = ["run", "--nproc_per_node=4", "lora_finetune_distributed", "--config", "llama3/8B_lora"]
    sizes = [f"device_memory={gib}", "tokenizer.max_seq_len=256"]
    assert main([*many, *sizes, "--dry-run"]) == 0
    assert ("shared by 4 devices" in capsys.readouterr().out) == shared


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["run", "generate", "--config", "tiny/generation", "--dry-run"], 2, "has no key dry_run"),
        ([*TINY, "batch_sise=3", "--dry-run"], 2, "did you mean 'batch_size'?"),
        ([*TINY, "device=cudda", "--dry-run"], 2, "did you mean 'cuda'?"),
        ([*TINY, "dtype=fp16", "--dry-run"], 2, "use dtype=bf16"),
        ([*TINY, "batch_size=0", "--dry-run"], 2, "batch_size is 0"),
        ([*TINY, "dataset.split=trian", "--dry-run"], 2, "trian"),
        ([*TINY, "tokenizer.max_seq_len=0", "--dry-run"], 2, "max_seq_len is 0"),
        ([*TINY, "device_memory=-1", "--dry-run"], 2, "device_memory is -1"),
        (
            ["run", "--nnodes=0", "full_finetune_distributed", "--config", "llama3/8B_full"],
            2,
            "--nnodes is 0",
        ),
    ],
)
def test_what_is_wrong_is_said_as_always(command, code, message, capsys):
    command = command if "--dry-run" in command else [*command, "--dry-run"]
    assert main(command) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("adapters", [False, True])
def test_auto_recomputes_what_the_memory_given_demands_and_changes_nothing(
    adapters, config, run, tmp_path, capsys
):
    config |= {"batch_size": 16, "gradient_accumulation_steps": 1, "max_steps_per_epoch": 2}
    config |= {"model": LORA_MODEL} if adapters else {}
    needed = []
    for recompute in (False, True):
        run(config, "dry_run=True", f"enable_activation_checkpointing={recompute}")
        needed.append(number(capsys.readouterr().out, "needed") / 1024)  # MiB
    assert needed[0] > needed[1]
    plain = run(config, f"output_dir={tmp_path}/plain")
    for memory, blocks in ((needed[0] + 0.1, 0), (needed[0] - 2e-5, 1), (needed[1] - 0.1, 2)):
        where = f"output_dir={tmp_path}/{blocks}"
        auto = run(config, where, "ac_mode=auto", f"device_memory={memory}")
        assert f"ac_mode=auto: {blocks} of 2 blocks are recomputed" in capsys.readouterr().err
        assert curve(auto) == curve(plain)


def test_a_loss_that_asks_for_values_cannot_be_planned_but_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asking.py").write_text(
        "from torch.nn import functional as F\n\n\n"
        "class Asking:\n"
        "    def __call__(self, model, batch):\n"
        "        chosen = batch['labels'] != -100\n"
        "        logits = model(batch['tokens'])[chosen].float()\n"
        "        return F.cross_entropy(logits, batch['labels'][chosen].long(), reduction='sum')\n"
    )
    own = ["loss=asking.Asking", "max_steps_per_epoch=1", "~dataset_val", f"output_dir={tmp_path}"]
    assert main([*TINY, *own, "--dry-run"]) == 2
    assert "loss Asking cannot be planned (NotImplementedError: " in capsys.readouterr().err
    assert main([*TINY, *own, "output_dir=run"]) == 0
