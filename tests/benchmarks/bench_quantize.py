"""torchao's quantizers on a random Llama in bfloat16 on this CPU, as `tune run quantize` saves and
`tune run generate` loads them: bytes of weights, perplexity of ids that the unquantized model drew
itself (a random model knows no text), and greedy decoding of 64 ids after a prompt of 64, batch 1.
All are loaded at once, laid out as `tune run generate` does it, and take turns, one text each.
`compiled` is how many times as fast as unquantized with `compile=true`, which compiles no
unquantized linears on a CPU. Times are CPU seconds where there is one thread. What cannot run here
is left out.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mytune.generation import generate, pack_linears
from mytune.models import auto_model
from mytune.modules import Decoder, LinearCrossEntropyLoss
from mytune.quantization import QUANTIZERS, stored_bytes
from mytune.quantization.quantizers import runnable
from mytune.training import FullModelHFCheckpointer, load_for_inference
from tests.benchmarks.common import THREADS, Row, median_ratio
from tests.benchmarks.model import SHAPES, write_model

TITLE = "Quantization"
PROMPT, NEW = 64, 64
CPU, BF16 = torch.device("cpu"), torch.bfloat16


def measure(quick: bool) -> list[Row]:
    """Return a row per model and quantizer."""
    torch.set_num_threads(THREADS)
    torch._dynamo.config.recompile_limit = 64  # for each kind of weights
    found: list[Row] = []
    for shape in ["deep"] if quick else ["deep", "wide"]:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "base", SHAPES[shape])
            found += measure_model(shape, Path(folder), turns=3 if quick else 9)
    return found


def measure_model(shape: str, folder: Path, turns: int) -> list[Row]:
    """Compare all quantizers on one model, turn by turn."""
    text = drawn(load(folder / "base"))
    models = {"none": load(folder / "base"), **quantized(folder)}
    facts = {name: (size(model), perplexity(model, text)) for name, model in models.items()}
    for model in models.values():
        pack_linears(model)
    ways = [(name, compile) for name in models for compile in (False, True)]
    ways.remove(("none", True))  # it is not compiled
    seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    for turn in range(1 + turns):  # the first one warms up
        for name, compile in ways:
            started = time.process_time() if THREADS == 1 else time.perf_counter()
            prompt = text[0, :PROMPT].tolist()
            list(generate(models[name], prompt, max_new_tokens=NEW, compile=compile))
            ended = time.process_time() if THREADS == 1 else time.perf_counter()
            if turn:
                seconds[name, compile].append(ended - started)
    base = seconds["none", False]
    return [
        {
            "model": shape,
            "quantizer": name,
            "MB": facts[name][0] / 1e6,
            "perplexity": facts[name][1],
            "tokens/s": NEW / statistics.median(seconds[name, False]),
            "x times as fast as unquantized": median_ratio(seconds[name, False], base),
            "compiled": median_ratio(seconds[name, True], base) if name != "none" else None,
        }
        for name in models
    ]


def quantized(folder: Path) -> dict[str, Decoder]:
    """Quantize the base with everything that runs here; save, and load what was saved."""
    here, found = runnable(CPU, BF16), {}
    for kind in QUANTIZERS:
        if kind.__name__ in here:
            quantizer, target = kind(), folder / kind.__name__
            model = load(folder / "base", quantizer=quantizer)
            FullModelHFCheckpointer(str(folder / "base")).save_quantized(target, model, quantizer)
            found[kind.__name__] = load(target)
    return found


def load(folder: Path, **how: Any) -> Decoder:
    with torch.device("meta"):
        model = auto_model(str(folder))
    return load_for_inference(model, FullModelHFCheckpointer(str(folder)), CPU, BF16, **how)


def drawn(model: Decoder) -> Tensor:
    """Return rows of ids that a model draws from its own distribution: [4, 257]."""
    rows = []
    for row in range(4):
        generator = torch.Generator().manual_seed(row)
        start = [3 + row]
        how: dict[str, Any] = {"temperature": 1.0, "generator": generator, "max_new_tokens": 256}
        rows.append(start + list(generate(model, start, **how)))
    return torch.tensor(rows)


@torch.no_grad()
def perplexity(model: Decoder, text: Tensor) -> float:
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:]}
    return math.exp(float(LinearCrossEntropyLoss()(model, batch)) / batch["labels"].numel())


def size(model: Decoder) -> int:
    return sum(stored_bytes(parameter) for parameter in model.parameters())
