"""Requests of the harness over TruthfulQA's questions, answered by mytune's adapter, by lm_eval's
own Hugging Face model and, where it can, by torchtune's wrapper of that: same weights, batch 8, and
all answers in a turn. Answers of the first two must agree; `differ by` is the largest difference of
two log-likelihoods, which lm_eval adds up in float32, or the share of texts that differ. `wide` has
Llama 3's vocabulary, `deep` one of 768 ids; the tokenizer is that of stories260K, whose ids are
nearly letters: a question has some 450 ids of examples before it. mytune has its memory in huge
pages, as `tune run eleuther_eval` begins on Linux. torchtune begins texts without
BOS, so its answers are others; where it is missing, it has no model with tied embeddings, or pads
with ids that the model has not and generates 256 tokens whatever is asked. They run at once and
take turns; times are CPU seconds where there is one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.torch import load_file, save_file

from mytune.cli.huge_pages import SETTING, TUNABLES
from mytune.models.llama3 import llama3_tokenizer
from tests.benchmarks.common import (
    NO_TORCHTUNE,
    TORCHTUNE_PYTHON,
    Row,
    median_ratio,
    take_turns,
    versions,
)
from tests.benchmarks.model import DTYPES, SHAPES, write_model
from tests.tokenizers.conftest import convert_to_json

TITLE = "Evaluation"
BATCH_SIZE = 8
# float32 has 24 bits: what sums of a thousand can differ by is a multiple of 1.2e-4.
TOLERANCE = 5e-4


class Case(NamedTuple):
    """What is measured: on how many questions, in a quick run (0: not then) and in a whole one."""

    model: str
    kind: str
    dtype: str
    quick: int
    questions: int
    turns: int


CASES = [
    Case("stories260K", "loglikelihood", "fp32", 10, 817, 1),
    Case("wide", "loglikelihood", "fp32", 1, 4, 3),
    Case("deep", "loglikelihood", "fp32", 2, 8, 3),
    Case("deep", "loglikelihood", "bf16", 0, 4, 3),
    Case("deep", "generate_until", "fp32", 8, 16, 3),
    Case("deep", "generate_until", "bf16", 0, 16, 3),
]
DEEP = replace(SHAPES["deep"], vocab_size=768)


def measure(quick: bool) -> list[Row]:
    """Return a row per case and library; nothing without the real data."""
    if not os.environ.get("MYTUNE_TEST_DATA"):
        raise SystemExit("MYTUNE_TEST_DATA is not set: there are no questions to measure with")
    if not torchtune_has_lm_eval():
        print(NO_TORCHTUNE, "with lm_eval==0.4.13")
    found: list[Row] = []
    for case in CASES:
        if case.quick or not quick:
            with tempfile.TemporaryDirectory() as folder:
                found += measure_case(Path(folder), case, quick)
    return found


def torchtune_has_lm_eval() -> bool:
    """Say whether torchtune can be measured: it needs the harness too."""
    if not TORCHTUNE_PYTHON:
        return False
    return "lm_eval" in versions(TORCHTUNE_PYTHON, ["lm_eval"])


def measure_case(folder: Path, case: Case, quick: bool) -> Iterator[Row]:
    """Compare all libraries in one case."""
    data = Path(os.environ["MYTUNE_TEST_DATA"])
    model, shape = data / "stories260K" / "hf", None
    if case.model != "stories260K":
        shape = DEEP if case.model == "deep" else SHAPES["wide"]
        model = folder / "model"
        write_model(model, shape)
        silence_special_tokens(model / "model.safetensors")
    questions = case.quick if quick else case.questions
    requests = folder / "requests.json"
    requests.write_text(json.dumps(list(make_requests(data, case.kind, questions))))
    tiktoken = data / "stories260K" / "hf" / "tokenizer.model"
    names = list(llama3_tokenizer(tiktoken).special_tokens)
    settings = {
        "model": str(model),
        "shape": shape and shape.arguments(),
        "tiktoken": str(tiktoken),
        "tokenizer": str(convert_to_json(tiktoken, folder / "tokenizer.json", names)),
        "requests": str(requests),
        "kind": case.kind,
        "dtype": DTYPES[case.dtype],
        "batch_size": BATCH_SIZE,
    }
    turns = 1 if quick else case.turns
    answers = take_turns(commands(settings), folder, turns, warm_up=int(case.turns > 1))
    seconds = {name: [turn["seconds"] for turn in said[1:]] for name, said in answers.items()}
    ours = answers["mytune"][-1]["answers"]
    for name, said in answers.items():
        differ = difference(ours, said[-1]["answers"]) if name != "torchtune" else None
        if case.dtype == "fp32" and differ is not None:
            assert differ <= TOLERANCE, (case, differ)  # else times mean nothing
        yield {
            "model": case.model,
            "requests": case.kind,
            "questions": questions,
            "dtype": case.dtype,
            "library": name,
            "requests/s": len(ours) / statistics.median(seconds[name]),
            "mytune is x times as fast": median_ratio(seconds["mytune"], seconds[name]),
            "peak MB": said[-1]["peak"] / 1e6,
            "differ by": differ,
        }


def silence_special_tokens(file: Path) -> None:
    """Keep a random model from ending its texts: libraries differ in which ids end one."""
    weights = load_file(file)
    head = weights["lm_head.weight"]
    head[:3] = 0  # never the largest logit
    head[512:768] = 0
    save_file(weights, file, metadata={"format": "pt"})


def difference(ours: list[Any], theirs: list[Any]) -> float:
    """Return the largest difference of log-likelihoods, or the share of texts that differ."""
    if isinstance(ours[0], str):
        return sum(a != b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    return max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))


def make_requests(data: Path, kind: str, questions: int) -> Iterator[list[Any]]:
    """Yield what lm_eval asks a model: TruthfulQA's answers to score, or questions to answer."""
    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    with (tasks / "truthfulqa_mc1.yaml").open() as file:
        prompt = yaml.safe_load(file)["doc_to_text"]
    examples = prompt.partition("set prompt_qa = '")[2].partition("'")[0].strip()
    with (data / "truthfulqa" / "truthfulqa_mc.jsonl").open() as file:
        rows = [json.loads(line) for line in file][:questions]
    for row in rows:
        context = f"{examples}\n\nQ: {row['question']}\nA:"
        if kind == "generate_until":
            yield [context, {"until": ["\n\n"], "max_gen_toks": 64}]
        else:
            yield from ([context, f" {choice}"] for choice in row["mc2_targets"]["choices"])


def commands(settings: dict[str, Any]) -> dict[str, Sequence[str]]:
    """Return the command of every library that is there and has what the case asks for."""
    peers = "tests.benchmarks.peers"
    ours = [sys.executable, "-m", f"{peers}.lm_eval_requests"]
    found = {name: [*ours, name, json.dumps(settings)] for name in ("mytune", "lm_eval")}
    if sys.platform == "linux":
        found["mytune"] = ["env", f"{TUNABLES}={SETTING}", *found["mytune"]]
    if settings["kind"] == "loglikelihood" and settings["shape"] and torchtune_has_lm_eval():
        theirs = [str(TORCHTUNE_PYTHON), "-m", f"{peers}.torchtune_requests"]
        found["torchtune"] = [*theirs, json.dumps(settings)]
    return found
