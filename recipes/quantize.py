"""Quantize a model's linears with torchao, and measure what it costs and gains.

    tune run quantize --config quantization checkpointer.checkpoint_dir=DIR
    tune run quantize --config quantization quantizer=mytune.quantization.Int4WeightOnlyQuantizer
    tune run quantize --config quantization perplexity_file=FILE.txt

`output_dir/quantized` is a checkpoint for generate and eleuther_eval; the table of size, perplexity
and speed goes to stdout and to `output_dir/quantization_report.json`. Copy it with
`tune cp quantize my_quantize.py` and change what you like.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mytune.config import Component, instantiate
from mytune.errors import ConfigError, DataError, DirectoryInUseError, NumericalError
from mytune.generation import PromptCache, generate, pack_linears
from mytune.modules import Decoder, LinearCrossEntropyLoss, make_plain
from mytune.quantization import check_quantizer, stored_bytes
from mytune.tokenizers import check_vocabulary
from mytune.training import (
    FullModelHFCheckpointer,
    describe_device,
    get_device,
    get_dtype,
    load_for_inference,
    log,
    output_dir_lock,
    set_deterministic,
    setup_logging,
    write_atomic,
)

Figures = dict[str, float | None]
REPORT = "quantization_report.json"


# The recipe hands nothing to components itself: a config names all that they need.
SUPPLIED: dict[str, list[str]] = {}


@dataclass(kw_only=True)
class Config:
    """Every key of a quantization config."""

    # Folder of the run: the checkpoint quantized/ and quantization_report.json.
    output_dir: str
    # Replace quantized/ in an output_dir that has one.
    overwrite_output_dir: bool = False

    # Builder of the model.
    model: Component
    # Which files hold the weights; they are only read. An adapter is merged before quantizing.
    checkpointer: Component
    # One of mytune.quantization, or a config of torchao's such as torchao.quantization....Config.
    quantizer: Component

    # Measure the perplexity of this text before and after; not measured if null.
    perplexity_file: str | None = None
    # Tokenizer and its file; needed for the perplexity alone.
    tokenizer: Component | None = None
    # The text is cut into windows of this many tokens, or of the model's positions if that is less.
    max_seq_len: int = 2048
    # Measure the speed of decoding over this many tokens, before and after; not measured if 0.
    decode_tokens: int = 64
    # Decode as `compile` of a generation config does.
    compile: bool = False

    # cuda, cuda:1, cpu, mps or xpu; some quantizers make weights for one kind of device alone.
    device: str = "cuda"
    # Of computation, and of the weights that are not quantized: bf16 or fp32.
    dtype: str = "bf16"
    # Deterministic kernels: default, warn, or error where there is none.
    cudnn_deterministic_mode: str | int | None = None
    # DEBUG, INFO, WARNING or ERROR.
    log_level: str = "INFO"


def main(cfg: Config) -> None:
    """Measure the model, quantize and save it, load it again and measure that."""
    setup_logging(cfg.log_level)
    check(cfg)
    device = get_device(cfg.device)
    dtype = get_dtype(cfg.dtype, device)
    set_deterministic(cfg.cudnn_deterministic_mode)
    checkpointer, quantizer = instantiate(cfg.checkpointer), instantiate(cfg.quantizer)
    target = Path(cfg.output_dir).expanduser() / "quantized"

    with output_dir_lock(target.parent):
        check_target(target, cfg.overwrite_output_dir, checkpointer.source_dir)
        model = build_model(cfg)
        checkpointer.plan(model.config, dtype)  # finds weights that are not the model's
        check_quantizer(quantizer, model, device, dtype, save=True)
        if model.config.tie_word_embeddings:
            log.info("the head is the embedding, which is not quantized")
        windows = text_windows(cfg, model)

        model = model.to(dtype)
        if windows or cfg.decode_tokens:  # else the unquantized model need not fit into memory
            model = load_for_inference(model, checkpointer, device, dtype)
        before = measure(cfg, model, windows)
        del model  # measuring may have packed its weights

        started = time.perf_counter()
        model = build_model(cfg)
        model = load_for_inference(model, checkpointer, device, dtype, quantizer=quantizer)
        log.info("Time for quantization: %.2f sec", time.perf_counter() - started)
        (target.parent / REPORT).unlink(missing_ok=True)  # one of other weights
        checkpointer.save_quantized(target, model, quantizer)
        del model

        saved = FullModelHFCheckpointer(str(target))
        model = load_for_inference(build_model(cfg), saved, device, dtype)
        after = measure(cfg, model, windows)
        report(cfg, target, device, before, after)


def check(cfg: Config) -> None:
    """Refuse numbers and combinations that cannot be."""
    problems = []
    if cfg.max_seq_len < 2:
        problems.append(f"max_seq_len is {cfg.max_seq_len}; it must be at least 2")
    if cfg.decode_tokens < 0:
        problems.append(f"decode_tokens is {cfg.decode_tokens}; it must be 0 or more")
    if cfg.perplexity_file is not None and cfg.tokenizer is None:
        problems.append("perplexity_file needs a tokenizer, which is null")
    if cfg.perplexity_file is not None and not Path(cfg.perplexity_file).expanduser().is_file():
        problems.append(f"perplexity_file is {cfg.perplexity_file!r}, and there is no such file")
    if problems:
        raise ConfigError("; ".join(problems))


def check_target(target: Path, overwrite: bool, source_dir: Path) -> None:
    """Keep what another run has saved, unless told otherwise; never replace what is read."""
    if target.resolve() == source_dir.resolve():
        raise ConfigError(f"output_dir: {target} is the checkpoint to be quantized; choose another")
    if target.exists() and not overwrite:
        raise DirectoryInUseError(
            f"output_dir: {target} is there already; choose another output_dir, or set "
            "overwrite_output_dir=True"
        )


def build_model(cfg: Config) -> Decoder:
    """Build the model without memory, and without the adapters of a lora_ or qlora_ builder.

    An adapter that is named in the checkpointer is merged.
    """
    with torch.device("meta"):
        model: Decoder = instantiate(cfg.model)
    make_plain(model)
    return model


def text_windows(cfg: Config, model: Decoder) -> list[Tensor]:
    """Return the text as rows of up to `max_seq_len + 1` ids; each but the first id is a label."""
    if cfg.perplexity_file is None:
        return []
    tokenizer = instantiate(cfg.tokenizer)
    check_vocabulary(tokenizer, model.config.vocab_size)
    try:
        text = Path(cfg.perplexity_file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"perplexity_file: {cfg.perplexity_file} cannot be read: {error}") from None
    ids = torch.tensor(tokenizer.encode(text, add_bos=True, add_eos=False))
    if len(ids) < 2:
        raise DataError(f"perplexity_file: {cfg.perplexity_file} is empty")
    length = min(cfg.max_seq_len, model.config.max_seq_len)
    # A window's last label is the next one's first id, so every token is predicted once.
    return [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]


def measure(cfg: Config, model: Decoder, windows: list[Tensor]) -> Figures:
    """Return bytes of weights, perplexity, and decoded tokens per second."""
    figures: Figures = {"bytes": sum(stored_bytes(parameter) for parameter in model.parameters())}
    figures["perplexity"] = perplexity(model, windows) if windows else None
    pack_linears(model)
    figures["tokens_per_second"] = decode_speed(model, cfg.decode_tokens, cfg.compile)
    return figures


@torch.no_grad()
def perplexity(model: Decoder, windows: list[Tensor]) -> float:
    """Return e to the mean loss of every token but the first."""
    loss_fn, loss = LinearCrossEntropyLoss(), 0.0
    for window in windows:
        row = window[None].to(model.device)
        loss += loss_fn(model, {"tokens": row[:, :-1], "labels": row[:, 1:]}).item()
    mean = loss / sum(len(window) - 1 for window in windows)
    if not math.isfinite(mean):
        raise NumericalError("the loss of the text is not finite: the weights are damaged")
    return math.exp(mean)


def decode_speed(model: Decoder, count: int, compile: bool) -> float | None:
    """Return how many tokens follow a short prompt each second, after the first."""
    prompt = [id % model.config.vocab_size for id in range(1, 17)]
    count = min(count, model.config.max_seq_len - len(prompt) - 1)
    if count < 1:
        return None
    # One, as a CUDA graph is recorded for it.
    cache = PromptCache(model, len(prompt) + count + 1, compile)
    list(generate(model, prompt, max_new_tokens=min(count, 8), prompt_cache=cache))  # warm up
    tokens = generate(model, prompt, max_new_tokens=count + 1, prompt_cache=cache)
    next(tokens)
    started = time.perf_counter()
    decoded = len(list(islice(tokens, count)))
    return decoded / (time.perf_counter() - started)


def report(
    cfg: Config, target: Path, device: torch.device, before: Figures, after: Figures
) -> None:
    """Print the figures as a table and write them as JSON."""
    file = target.parent / REPORT
    content = {
        "checkpoint": str(target),
        "quantizer": cfg.quantizer,
        "perplexity_file": cfg.perplexity_file,
        "device": describe_device(device),
        "dtype": cfg.dtype,
        "compile": cfg.compile,
        "before": before,
        "after": after,
    }
    write_atomic(file, (json.dumps(content, indent=2, default=dict) + "\n").encode())
    print(f"{'':<18}{'before':>14}{'after':>14}{'ratio':>8}")
    for name, was in before.items():
        now = after[name]
        if was is not None and now is not None:
            figures = f"{format_number(was):>14}{format_number(now):>14}{now / was:>8.3f}"
            print(f"{name.replace('_', ' '):<18}{figures}")
    log.info("report: %s", file)
    log.info("to use it: checkpointer.checkpoint_dir=%s", target)


def format_number(value: Any) -> str:
    """Return a count with its thousands, another number with four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:#,.4g}".rstrip(".")
