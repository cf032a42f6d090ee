"""QLoRA on the CPU: it trains as LoRA does over the weights that its 4 bits stand for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mytune.quantization import dequantize_nf4, quantize_nf4
from tests.recipes.conftest import LEVERS, LORA, assert_same_curve

QLORA = {**LORA, "_component_": "mytune.models.qlora_auto_model"}
VARIANTS = {
    "linears": {},
    "embeddings too": {"quantize_embeddings": True},
    "DoRA": {"use_dora": True},
}


def rounded(checkpoint: Path, folder: Path, embeddings: bool) -> Path:
    """Copy a checkpoint with every weight that QLoRA quantizes as what its 4 bits stand for."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    kept = ["norm"] if embeddings else ["norm", "embed_tokens", "lm_head"]
    for name, weight in weights.items():
        if not any(word in name for word in kept):
            packed = quantize_nf4(weight.float())
            weights[name] = dequantize_nf4(*packed, tuple(weight.shape), torch.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_qlora_is_lora_over_the_dequantized_weights(run, config, checkpoint, tmp_path, variant):
    more = VARIANTS[variant]
    base = rounded(checkpoint, tmp_path / "base", variant == "embeddings too")
    qlora = run({**config, "model": {**QLORA, **more}}, "epochs=2")
    only_lora = {key: value for key, value in more.items() if key == "use_dora"}
    lora = run(
        {**config, "model": {**LORA, **only_lora}},
        "epochs=2",
        f"checkpointer.checkpoint_dir={base}",
        f"output_dir={tmp_path / 'lora'}",
    )
    assert_same_curve(qlora, lora, rel=1e-5)
    assert_loads_elsewhere(Path(config["output_dir"]) / "epoch_1", base, checkpoint)


@torch.no_grad()
def assert_loads_elsewhere(saved: Path, base: Path, checkpoint: Path) -> None:
    """The merged model has the original's names, dtypes and shapes; PEFT agrees with it."""
    ours, original = (load_file(f / "model.safetensors") for f in (saved, checkpoint))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in original.items()
    }
    tokens = torch.arange(3, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    start = plain(tokens).logits
    adapted = peft.PeftModel.from_pretrained(plain, saved / "adapter")
    logits = adapted(tokens).logits
    torch.testing.assert_close(merged(tokens).logits, logits, rtol=0, atol=1e-5)
    assert (logits - start).abs().max() > 1e-2


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_nothing(run, config, lever):
    """Packed, so that all steps have one shape, for which there is one compilation."""
    override, tolerance = LEVERS[lever]
    model = {**QLORA, "quantize_embeddings": True, "lora_dropout": 0.0 if tolerance else 0.1}
    config = {**config, "model": model}
    same = ("dataset.packed=True", "max_steps_per_epoch=2", "gradient_accumulation_steps=1")
    plain = run(config, *same)
    other = run(config, *same, override, f"output_dir={config['output_dir']}_other")
    assert_same_curve(plain, other, rel=tolerance)


LOADING = """
import json, weakref
from collections.abc import Mapping
import torch
from mytune.models.llama3 import qlora_llama3
from mytune.quantization.nf4 import NF4Linear
from mytune.training import load_adapters, load_weights, memory_stats, reset_peak_memory

CPU = torch.device("cpu")
with torch.device("meta"):
    model = qlora_llama3(
        ["q_proj"], vocab_size=2048, num_layers=16, num_heads=8, num_kv_heads=8, embed_dim=512,
        intermediate_dim=1536, max_seq_len=64, quantize_embeddings=True,
    )
    shapes = {
        f"{n}.weight": (m.out_features, m.in_features)
        for n, m in model.named_modules() if isinstance(m, NF4Linear)
    }
    shapes |= {n: p.shape for n, p in model.named_parameters() if "norm" in n}

class Weights(Mapping):
    # Made when it is asked for, as from a file; says how many of them are alive.
    alive, most = weakref.WeakSet(), 0
    def __getitem__(self, name):
        tensor = torch.randn(shapes[name]).bfloat16()
        if "norm" not in name:
            self.alive.add(tensor)
        Weights.most = max(self.most, len(self.alive))
        return tensor
    def __iter__(self):
        return iter(shapes)
    def __len__(self):
        return len(shapes)

# What the first use of an operator brings into memory is code, and no weight.
NF4Linear(512, 64).quantize_(Weights()["layers.0.mlp.up_proj.weight"][:64])
reset_peak_memory(CPU)
before = memory_stats(CPU)["peak_memory_rss"]
load_weights(model, Weights(), CPU, torch.bfloat16)
load_adapters(model, None, CPU, seed=0)
peak = memory_stats(CPU)["peak_memory_rss"] - before
count = sum(torch.Size(shape).numel() for shape in shapes.values())
print(json.dumps({"alive": Weights.most, "peak": peak * 2**30 / count}))
"""


def test_loading_never_holds_the_model():
    """56 M weights: 0.52 bytes each in NF4, and what one of 1 M takes; in bfloat16 2 bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["alive"] <= 2  # the one that comes, and the one before
    assert found["peak"] < 1.0
