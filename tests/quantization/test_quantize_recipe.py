"""`tune run quantize`: the checkpoint, the figures, what generate makes of it, what is refused."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mytune.assets import ASSETS
from mytune.cli.main import main
from mytune.errors import ResourceError
from mytune.generation import generate
from mytune.models.llama3 import llama3_tokenizer
from mytune.quantization import Int8WeightOnlyQuantizer
from mytune.training import FullModelHFCheckpointer
from tests.quantization.conftest import load
from tests.quantization.test_quantized_checkpoints import hashes

TINY = ASSETS / "tiny"
QUICK = ("decode_tokens=4", "perplexity_file=null")


@pytest.fixture
def quantize(tmp_path, capfd):
    """Run the recipe on the embedded model into a folder; return stdout and stderr."""

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        command = ["run", "quantize", "--config", "tiny/quantization", f"output_dir={tmp_path}/q"]
        assert main([*command, *words]) == code
        out, err = capfd.readouterr()
        return out, err

    return run


def plain_perplexity(model, length: int) -> float:
    """By hand: whole logits, every token but the first predicted once, in windows of `length`."""
    tokenizer = llama3_tokenizer(TINY / "tokenizer.model")
    text = (ASSETS / "stories" / "test.txt").read_text()
    ids = torch.tensor(tokenizer.encode(text, add_bos=True, add_eos=False))
    losses = []
    for start in range(0, len(ids) - 1, length):
        tokens, labels = ids[start : start + length], ids[start + 1 : start + length + 1]
        with torch.inference_mode():
            logits = model(tokens[None, : len(labels)])[0].double()
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
    assert sum(map(len, losses)) == len(ids) - 1
    return math.exp(torch.cat(losses).mean())


def test_the_run_leaves_a_checkpoint_and_an_honest_report(quantize, tmp_path):
    before = hashes(TINY)
    out, err = quantize("max_seq_len=100", "decode_tokens=8", "dtype=fp32")
    assert hashes(TINY) == before
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    model, quantized = load(TINY, torch.float32), load(tmp_path / "q/quantized", torch.float32)
    for name, each in {"before": model, "after": quantized}.items():
        expected = plain_perplexity(each, 100)
        assert math.isclose(report[name]["perplexity"], expected, rel_tol=1e-6)
        assert report[name]["tokens_per_second"] > 0
    assert report["before"]["perplexity"] != report["after"]["perplexity"]
    assert report["before"]["bytes"] == sum(p.nbytes for p in model.parameters())
    size = (tmp_path / "q/quantized/model.safetensors").stat().st_size
    assert 0 < size - report["after"]["bytes"] < 30_000  # the header
    assert report["quantizer"] == {"_component_": "mytune.quantization.Int8WeightOnlyQuantizer"}
    head, *rows = [line.split() for line in out.splitlines()]
    assert head == ["before", "after", "ratio"]
    assert [row[0] for row in rows] == ["bytes", "perplexity", "tokens"]
    assert float(rows[0][-1]) == round(report["after"]["bytes"] / report["before"]["bytes"], 3)
    assert f"checkpointer.checkpoint_dir={tmp_path}/q/quantized" in err


def test_compile_is_for_what_a_cpu_can_compile(quantize, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda block: compiled.append(block) or block)
    quantizer = "quantizer=mytune.quantization.Int8DynActInt8WeightQuantizer"
    quantize(*QUICK, quantizer, "compile=true")
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    assert report["compile"] and report["after"]["tokens_per_second"] > 0
    assert len(compiled) == 1  # after, and not before


def generated(capfd, *words: str) -> str:
    capfd.readouterr()
    command = ["run", "generate", "--config", "tiny/generation", "prompt=Once upon a time"]
    assert main([*command, "temperature=0", "max_new_tokens=30", *words]) == 0
    return capfd.readouterr().out


def test_generate_tells_what_the_quantized_model_tells(quantize, tmp_path, capfd):
    quantize(*QUICK, "dtype=fp32")
    quantizer = "mytune.quantization.Int8WeightOnlyQuantizer"
    tokenizer = llama3_tokenizer(TINY / "tokenizer.model")
    ids = tokenizer.encode("Once upon a time", add_bos=True, add_eos=False)
    model = load(TINY, torch.float32, quantizer=Int8WeightOnlyQuantizer())
    tokens = generate(model, ids, max_new_tokens=30, stop_tokens=tokenizer.stop_tokens)
    expected = "Once upon a time" + tokenizer.decode(list(tokens)) + "\n"
    directory = f"checkpointer.checkpoint_dir={tmp_path}/q/quantized"
    assert generated(capfd, directory) == expected
    assert generated(capfd, f"quantizer={quantizer}") == expected
    assert generated(capfd, directory, f"quantizer={quantizer}") == expected  # torchtune's way


def test_another_runs_result_is_kept_unless_told_otherwise(quantize, tmp_path):
    quantize(*QUICK)
    before = hashes(tmp_path / "q")
    _, err = quantize(*QUICK, code=7)
    assert "is there already" in err and "overwrite_output_dir=True" in err
    assert hashes(tmp_path / "q") == before
    other = "quantizer=mytune.quantization.Float8WeightOnlyQuantizer"
    quantize(*QUICK, other, "overwrite_output_dir=true")
    said = json.loads((tmp_path / "q/quantized/quantization.json").read_text())
    assert said["quantizer"] == "Float8WeightOnlyConfig"
    assert {path.name for path in (tmp_path / "q").iterdir()} == {
        "quantized",
        "quantization_report.json",
    }


def test_no_report_stands_beside_weights_that_it_is_not_of(quantize, tmp_path, monkeypatch):
    quantize(*QUICK)
    report = tmp_path / "q" / "quantization_report.json"
    assert report.exists()

    def failing(self, target, *_):
        assert not report.exists()
        raise ResourceError(f"no room for {target}")

    monkeypatch.setattr(FullModelHFCheckpointer, "save_quantized", failing)
    quantize(*QUICK, "overwrite_output_dir=true", code=5)


def test_without_measurements_the_base_is_never_loaded(quantize, tmp_path):
    _, err = quantize("perplexity_file=null", "decode_tokens=0")
    assert err.count("Reading 2.02 MiB") == 1 and err.count("Reading quantized weights") == 1
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    size = sum(p.nbytes for p in load(TINY).parameters())
    assert report["before"] == {"bytes": size, "perplexity": None, "tokens_per_second": None}


def test_a_builder_with_adapters_gives_its_sizes_only(quantize, tmp_path):
    lora = ("model._component_=mytune.models.qlora_auto_model", "model.lora_modules=[q_proj]")
    quantize(*QUICK, *lora)
    expected = load(TINY, quantizer=Int8WeightOnlyQuantizer())
    found = load(tmp_path / "q" / "quantized")
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(found(tokens), expected(tokens))


def test_a_quantized_checkpoint_is_not_quantized_again(quantize, tmp_path):
    quantize(*QUICK)
    base = f"checkpointer.checkpoint_dir={tmp_path}/q/quantized"
    _, err = quantize(*QUICK, base, f"output_dir={tmp_path}/again", code=4)
    assert "holds a quantized model" in err
    _, err = quantize(*QUICK, base, "overwrite_output_dir=true", code=2)
    assert "is the checkpoint to be quantized" in err


REFUSED = {
    "quantizer=mytune.quantization.Int8WeightOnlyQuantiser": (
        2,
        "unknown component .*did you mean 'Int8WeightOnlyQuantizer'",
    ),
    "quantizer=mytune.modules.LinearCrossEntropyLoss": (
        2,
        "quantizer is a LinearCrossEntropyLoss",
    ),
    "quantizer={_component_: torchao.quantization.Int8WeightOnlyConfig, group_size: 32}": (
        2,
        r"Int8WeightOnlyConfig\(group_size=32\): Only support version 2 with group_size=None",
    ),
    "quantizer=mytune.quantization.Float8DynActFloat8WeightQuantizer": (
        5,
        "cannot run .*\n  these can: Int8WeightOnlyQuantizer",
    ),
    "quantizer={_component_: torchtune.training.quantization.Int8DynActInt4WeightQuantizer, "
    "groupsize: 256}": (2, "groupsize is 256, .* must divide .* which are .*: 32 does"),
    "quantizer={_component_: mytune.quantization.Int8DynActInt4WeightQuantizer, groupsize: 0}": (
        2,
        "groupsize is 0",
    ),
    "quantizer={_component_: mytune.quantization.Int8WeightOnlyQuantizer, groupsize: 32}": (
        2,
        "takes no argument 'groupsize'",
    ),
    "max_seq_len=1": (2, "max_seq_len is 1"),
    "decode_tokens=-1": (2, "decode_tokens is -1"),
    "tokenizer=null": (2, "perplexity_file needs a tokenizer"),
    "perplexity_file=nowhere.txt": (2, "'nowhere.txt', and there is no such file"),
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_wrong_is_said_before_weights_are_read(quantize, tmp_path, word):
    code, message = REFUSED[word]
    _, err = quantize(word, code=code)
    assert re.search(message, err), err
    assert "Reading" not in err
    assert not (tmp_path / "q" / "quantized").exists()


def test_ctrl_c_and_a_kill_leave_nothing_half_done(quantize, tmp_path):
    (tmp_path / "long.txt").write_text("Once upon a time there was a fox. " * 50_000)
    words = (f"output_dir={tmp_path}/q", f"perplexity_file={tmp_path}/long.txt")
    command = ["run", "quantize", "--config", "tiny/quantization", *words]
    command = [sys.executable, "-m", "mytune", *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("Reading"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.stderr.close()
    assert list((tmp_path / "q").iterdir()) == []

    draft = tmp_path / "q" / f"quantized.tmp-{'0' * 32}"  # as a kill would leave it
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    quantize(*QUICK)
    assert not draft.exists() and (tmp_path / "q" / "quantized").is_dir()


@pytest.mark.data
def test_the_stories_model_keeps_its_perplexity(quantize, data_dir, tmp_path):
    folder = data_dir / "stories260K" / "hf"
    words = ("perplexity_file=" + str(tmp_path / "text.txt"), "decode_tokens=0", "dtype=fp32")
    text = (data_dir / "text" / "input.txt").read_text()[:20_000]
    (tmp_path / "text.txt").write_text(text)
    quantize(f"checkpointer.checkpoint_dir={folder}", *words)
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    before, after = (report[name]["perplexity"] for name in ("before", "after"))
    assert before != after and math.isclose(before, after, rel_tol=0.02)
    assert report["before"]["tokens_per_second"] is None
    int4 = "quantizer={_component_: mytune.quantization.Int4WeightOnlyQuantizer, groupsize: 32}"
    overrides = (f"checkpointer.checkpoint_dir={folder}", f"output_dir={tmp_path}/int4", int4)
    _, err = quantize(*overrides, *QUICK, code=2)  # its kernels want 16 rows, these have 172
    assert "does not fit the model, whose linears are 32 x 64, 64 x 64, 64 x 172, 172 x 64" in err


def test_other_recipes_do_not_import_torchao():
    script = (
        "import sys; from mytune.cli.main import main;"
        "code = main(['validate', 'tiny/lora_single_device']);"
        "code += main(['validate', 'tiny/generation']); code += main(['validate', 'quantization',"
        "'checkpointer.checkpoint_dir=.', 'tokenizer.path=.']); import mytune.training.inference;"
        "sys.exit(code or 'torchao' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=100).returncode == 0


def test_the_page_lists_every_quantizer():
    from mytune.quantization import QUANTIZERS

    page = (Path(__file__).parents[2] / "docs" / "quantize.md").read_text()
    for kind in QUANTIZERS:
        assert f"| `{kind.__name__}" in page
