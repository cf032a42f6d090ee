"""Make the embedded model from nothing: `make tiny` (needs the extra `[dev]`).

Writes text and instructions, makes a tokenizer and random weights, trains them with the full
fine-tuning recipe, and puts the result into `mytune/assets/tiny`. Takes some minutes.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiktoken._educational import bpe_train

from mytune.assets import ASSETS
from mytune.assets.corpus import Row, instructions, iso_dates, story
from mytune.tokenizers.llama3 import PATTERN

BASE_VOCABULARY = 768
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": BASE_VOCABULARY + 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": BASE_VOCABULARY,
    "eos_token_id": [BASE_VOCABULARY + 1, BASE_VOCABULARY + 9],
    "torch_dtype": "float32",
}
TRAINING = """
output_dir: {work}/run
model: {{_component_: mytune.models.auto_model, checkpoint_dir: {work}/start}}
tokenizer:
  _component_: mytune.models.llama3.llama3_tokenizer
  path: {work}/start/tokenizer.model
  max_seq_len: 256
checkpointer:
  _component_: mytune.training.FullModelHFCheckpointer
  checkpoint_dir: {work}/start
  output_dir: {work}/run
dataset:
  - _component_: mytune.datasets.text_completion_dataset
    source: {work}/text.jsonl
    packed: true
  - _component_: mytune.datasets.instruct_dataset
    source: {work}/rows.jsonl
    packed: true
optimizer: {{_component_: torch.optim.AdamW, lr: 3e-3, betas: [0.9, 0.95], fused: true}}
lr_scheduler:
  _component_: mytune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
batch_size: 8
epochs: {epochs}
clip_grad_norm: 1.0
seed: 0
device: cpu
dtype: fp32
"""
EPOCHS = 3
COMPANIONS = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
)
GENERATION = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id")}


def main() -> None:
    """Make everything that `mytune/assets` holds besides code."""
    rng = Random(0)
    stories = [story(rng) for _ in range(6_000)]
    rows = list(instructions(rng, 40_000))
    dates = iso_dates(rng, 3_200)
    write_rows(ASSETS / "dates" / "train.jsonl", dates[:3_000])
    write_rows(ASSETS / "dates" / "test.jsonl", dates[3_000:])
    write_unseen_text(ASSETS / "stories" / "test.txt")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_rows(work / "text.jsonl", [{"text": text} for text in stories])
        write_rows(work / "rows.jsonl", rows)
        start = work / "start"
        start.mkdir()
        write_tokenizer(start / "tokenizer.model", stories, rows)
        write_random_weights(start)
        train(work)
        publish(work / "run" / f"epoch_{EPOCHS - 1}", ASSETS / "tiny")


def write_unseen_text(file: Path) -> None:
    """Write stories that the model is not trained on, to measure its perplexity."""
    rng = Random(1)
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(story(rng) for _ in range(100)) + "\n")


def write_rows(file: Path, rows: list[Row]) -> None:
    """Write one JSON object per line."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tokenizer(file: Path, stories: list[str], rows: list[Row]) -> None:
    """Train byte pairs on a part of the text; write them in tiktoken's format."""
    sample = [*stories[:600], *(f"{row['input']} {row['output']}" for row in rows[:600])]
    ranks = bpe_train("\n".join(sample), BASE_VOCABULARY, PATTERN, visualise=None)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    file.write_text("".join(lines))


def write_random_weights(folder: Path) -> None:
    """Write a Hugging Face checkpoint of random weights: normal, 0.02, residual outputs smaller."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= (2 * CONFIG["num_hidden_layers"]) ** 0.5
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2))


def train(work: Path) -> None:
    """Train all weights with the recipe that users run."""
    config = work / "pretrain.yaml"
    config.write_text(TRAINING.format(work=work, epochs=EPOCHS))
    recipe = [sys.executable, "-m", "mytune", "run", "full_finetune_single_device"]
    subprocess.run([*recipe, "--config", str(config)], check=True)


def publish(trained: Path, target: Path) -> None:
    """Copy what a Hugging Face checkpoint needs, weights as bfloat16."""
    target.mkdir(exist_ok=True)
    weights = {k: v.bfloat16() for k, v in load_file(trained / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "bfloat16"}, indent=2))
    for name in COMPANIONS:
        (target / name).write_bytes((trained / name).read_bytes())


if __name__ == "__main__":
    main()
