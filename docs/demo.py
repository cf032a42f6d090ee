"""What `make demo` runs: LoRA teaches the embedded model to write dates; before, after, where."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a million parameters gain nothing from more

import torch

from mytune.assets import ASSETS
from mytune.generation import complete
from mytune.models import auto_model
from mytune.models.llama3 import llama3_tokenizer
from mytune.tokenizers import Message
from mytune.training import FullModelHFCheckpointer, load_for_inference

OUTPUT = Path("outputs/demo")
CPU = torch.device("cpu")


def main() -> None:
    """Answer held-out questions, fine-tune, answer them again."""
    rows = [json.loads(line) for line in (ASSETS / "dates/test.jsonl").read_text().splitlines()]
    print("Before: the base model has never seen an ISO date.")
    before = answers(ASSETS / "tiny", rows)
    tune("run", "lora_finetune_single_device", "--config", "tiny/lora_single_device",
         f"output_dir={OUTPUT}", "overwrite_output_dir=true")  # fmt: skip
    trained = sorted(OUTPUT.glob("epoch_*"))[-1]
    after = answers(trained, rows)
    show(rows, before, after)
    print("\nThe same through `tune run generate`:")
    tune("run", "generate", "--config", "tiny/generation", f"checkpointer.checkpoint_dir={trained}",
         f"prompt.user={rows[0]['input']}", "temperature=0")  # fmt: skip
    print(f"""
Where things are:
  merged model (loads in transformers and vLLM)  {trained}
  adapter (loads in PEFT)                        {trained / "adapter"}
  log, one JSON object per step                  {OUTPUT / "metrics.jsonl"}
  loss curve                                     {OUTPUT / "loss_curve.png"}
  summary                                        {OUTPUT / "summary.json"}""")


def tune(*arguments: str) -> None:
    """Run a `tune` command, shown as a user would type it."""
    print("\n$", shlex.join(("tune", *arguments)), flush=True)
    subprocess.run([sys.executable, "-m", "mytune", *arguments], check=True)


def answers(checkpoint: Path, rows: list[dict[str, str]]) -> list[str]:
    """Return a checkpoint's greedy answer to each row's question."""
    tokenizer = llama3_tokenizer(str(checkpoint))
    with torch.device("meta"):
        model = auto_model(str(checkpoint))
    model = load_for_inference(model, FullModelHFCheckpointer(str(checkpoint)), CPU, torch.float32)
    questions = [[Message("user", row["input"])] for row in rows]
    prompts = [tokenizer.tokenize_messages(q, add_generation_prompt=True)[0] for q in questions]
    return [each.text for each in complete(model, prompts, tokenizer, max_new_tokens=16)]


def show(rows: list[dict[str, str]], before: list[str], after: list[str]) -> None:
    """Print the share of exact answers, before and after, and three samples."""
    expected = [row["output"] for row in rows]
    print(f"\nExact answers to {len(rows)} held-out questions:")
    for name, given in (("before", before), ("after", after)):
        right = sum(a == b for a, b in zip(given, expected, strict=True))
        print(f"  {name:<7}{right / len(rows):6.1%}")
    print("\nThree of them:")
    for row, old, new in list(zip(rows, before, after, strict=True))[:3]:
        print(f"  {row['input']}\n    before: {old!r}\n    after:  {new!r}")


if __name__ == "__main__":
    main()
