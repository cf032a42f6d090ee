"""Generate text from a prompt with a base model, a fine-tuned one, or a base model and an adapter.

    tune run generate --config generation prompt="Hello, my name is"
    tune run generate --config generation prompt.user="Tell me a joke." prompt.system="Be brief."
    tune run generate --config generation checkpointer.adapter_checkpoint=run/epoch_0/adapter
    tune run generate --config generation prompt_file=prompts.jsonl > answers.jsonl

The text goes to stdout as it comes, everything else to stderr. Several answers, or answers with
log-probabilities, are JSON lines. Copy it with `tune cp generate my_generate.py` and change what
you like.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mytune.config import Component, instantiate
from mytune.datasets import OpenAIToMessages, open_source
from mytune.errors import ConfigError, DataError, check_at_least, printable, shortened
from mytune.generation import (
    COMPILES,
    Sampling,
    TextStream,
    can_compile,
    check_prompt,
    check_sampling,
    complete,
    generate,
    pack_linears,
    stop_ids,
)
from mytune.modules import Decoder, DecoderConfig
from mytune.quantization import stored_bytes
from mytune.tokenizers import Message, ModelTokenizer, check_vocabulary
from mytune.training import (
    get_device,
    get_dtype,
    load_for_inference,
    log,
    peak_memory_gb,
    set_deterministic,
    set_seed,
    setup_logging,
)

# The recipe hands nothing to components itself: a config names all that they need.
SUPPLIED: dict[str, list[str]] = {}


@dataclass(kw_only=True)
class Config:
    """Every key of a generation config."""

    # Builder of the model; an adapter needs no builder of its own.
    model: Component
    # Tokenizer and its file.
    tokenizer: Component
    # Which files hold the weights; adapter_checkpoint names a PEFT adapter to use with them.
    checkpointer: Component
    # Nothing is written; here for configs whose checkpointer refers to it.
    output_dir: str = "."

    # A text to continue, or a turn of a chat to answer: {system: ..., user: ...}.
    prompt: Any = None
    # A file of prompts to answer instead, one JSON object per line: {"prompt": ...}, with what
    # prompt can be, {"user": ..., "system": ...} or {"messages": [...]}. Answers are JSON lines.
    prompt_file: str | None = None
    # Prompts of the file that are answered together.
    batch_size: int = 8
    # Stop after this many tokens, if no stop token comes before.
    max_new_tokens: int = 300
    # 0 always takes the likeliest token; higher is more varied.
    temperature: float = 0.6
    # Draw from this many likeliest tokens; null for all.
    top_k: int | None = 300
    # Draw from the likeliest tokens that together reach this probability; null for all.
    top_p: float | None = None
    # Draw from the tokens at least this many times as likely as the likeliest one; null for all.
    min_p: float | None = None
    # Above 1: tokens that the text already has become less likely.
    repetition_penalty: float = 1.0
    # Texts, or names of special tokens, that end the answer, such as ["\n\n"]; they are not part of
    # it. null for none.
    stop: list[str] | None = None
    # Answers to each prompt; more than one come as JSON lines.
    num_samples: int = 1
    # Write the new tokens and their log-probabilities too; answers come as JSON lines.
    logprobs: bool = False
    # The same seed gives the same text; a random one, which is logged, if null.
    seed: int | None = 1234

    # cuda, cuda:1, cpu, mps or xpu.
    device: str = "cuda"
    # Of weights and computation: bf16 or fp32.
    dtype: str = "bf16"
    # Compile the step for one token: it takes a while, then every token takes less. On a CPU only
    # with quantized weights; others are laid out for its own kernels instead.
    compile: bool = False
    # Quantize the linears once they are loaded; a quantized checkpoint needs none.
    quantizer: Component | None = None
    # Deterministic kernels: default, warn, or error where there is none.
    cudnn_deterministic_mode: str | int | None = None
    # DEBUG, INFO, WARNING or ERROR.
    log_level: str = "INFO"


def main(cfg: Config) -> int:
    """Load, generate, report the speed; returns 130 after Ctrl-C."""
    setup_logging(cfg.log_level)
    sampling = read_sampling(cfg)
    device = get_device(cfg.device)
    dtype = get_dtype(cfg.dtype, device)
    set_deterministic(cfg.cudnn_deterministic_mode)
    generator = torch.Generator(device).manual_seed(set_seed(cfg.seed))

    # What can be wrong with a prompt is found before the weights are read.
    tokenizer = instantiate(cfg.tokenizer)
    checkpointer, quantizer = instantiate(cfg.checkpointer), instantiate(cfg.quantizer)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    check_vocabulary(tokenizer, model.config.vocab_size)
    if cfg.prompt_file is None:
        rows, prompts = [{"prompt": cfg.prompt}], [tokenize_prompt(cfg.prompt, tokenizer)]
        check_prompt(prompts[0], model.config)
    else:
        rows, prompts = read_prompts(cfg.prompt_file, tokenizer, model.config)
    if max(map(len, prompts)) + cfg.max_new_tokens > model.config.max_seq_len:
        log.warning("the text will end at the model's %d positions", model.config.max_seq_len)

    warn_of_special_tokens(rows, tokenizer)

    model = load_for_inference(model, checkpointer, device, dtype, quantizer=quantizer)
    streamed = cfg.prompt_file is None and cfg.num_samples == 1 and not cfg.logprobs
    # Prompts are read in one pass over the weights, then each of the new tokens takes one.
    together = min(cfg.batch_size, len(prompts))
    samples = together * cfg.num_samples
    prompt_tokens = together * max(map(len, prompts))
    pack_linears(model, samples, tokens_per_pass=samples + prompt_tokens // cfg.max_new_tokens)
    if cfg.compile:
        log.info("compile: %s", COMPILES[can_compile(model)])
    bytes_read = bytes_per_token(model)

    settings: dict[str, Any] = {
        "max_new_tokens": cfg.max_new_tokens,
        "generator": generator,
        "compile": cfg.compile,
        **sampling,
    }
    started = time.perf_counter()
    if streamed:
        stops = stop_ids(tokenizer, cfg.stop or ())
        tokens = generate(model, prompts[0], stop_tokens=stops, **settings)
        if isinstance(cfg.prompt, str):
            print(for_terminal(cfg.prompt), end="", flush=True)
        count, interrupted = stream(tokens, TextStream(tokenizer.stream_decoder(), cfg.stop or ()))
    else:
        settings |= {"num_samples": cfg.num_samples, "logprobs": cfg.logprobs}
        settings["stop"] = cfg.stop or ()
        answers = answer(model, rows, prompts, tokenizer, cfg.batch_size, settings)
        count, interrupted = write(answers)
    # A step of several rows reads the weights once: tokens do not say how many steps there were.
    report(count, time.perf_counter() - started, bytes_read if streamed else None, device)
    return 130 if interrupted else 0


def read_sampling(cfg: Config) -> Sampling:
    """Return how tokens are drawn; raise ConfigError for what cannot be, in other keys as well."""
    sampling = Sampling(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
    )
    check_sampling(**sampling)
    check_at_least(
        1, {key: getattr(cfg, key) for key in ("batch_size", "num_samples", "max_new_tokens")}
    )
    if "" in (cfg.stop or []):
        raise ConfigError("stop has an empty text, which would end every answer; remove it")
    return sampling


def tokenize_prompt(prompt: Any, tokenizer: ModelTokenizer) -> list[int]:
    """Return the ids of a text to continue, or of a chat up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_bos=True, add_eos=False)
    roles = ("system", "user")
    texts = prompt if isinstance(prompt, Mapping) else {}
    are_texts = all(isinstance(text, str | None) for text in texts.values())
    if set(texts) - set(roles) or not texts.get("user") or not are_texts:
        raise ConfigError(
            f"prompt is {prompt!r}; it must be a text, or a mapping with user and perhaps system, "
            "which are texts; what YAML takes for something else needs quotes: prompt='\"5\"'"
        )
    messages = [Message(role, texts[role]) for role in roles if texts.get(role)]
    return tokenizer.tokenize_messages(messages, add_generation_prompt=True)[0]


def read_prompts(
    file: str, tokenizer: ModelTokenizer, config: DecoderConfig
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Return the rows of a file and the ids of their prompts.

    Raises:
        ConfigError: there is no such file.
        DataError: rows that cannot be answered, each with its `file:row`.
    """
    if not Path(file).expanduser().is_file():
        there = Path(file).expanduser().exists()
        what = "that is no regular file" if there else "there is no such file"
        raise ConfigError(f"prompt_file is {file!r}, and {what}")
    rows, prompts, problems = [], [], []
    for where, row in open_source(file).read():
        try:
            ids = tokenize_row(row, tokenizer)
            check_prompt(ids, config)
            check_row(row)
            rows.append(row)
            prompts.append(ids)
        except (ConfigError, DataError) as error:
            problems.append(f"{where}: {error}")
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        many = f"{len(problems)} rows of prompt_file cannot be answered"
        raise DataError(many, shortened(problems))
    if not rows:
        raise DataError(f"prompt_file {file} has no rows")
    return rows, prompts


def tokenize_row(row: Any, tokenizer: ModelTokenizer) -> list[int]:
    """Return the ids of a row's prompt; raise ConfigError or DataError if it has none."""
    kinds = sorted({"messages", "prompt", "user"} & row.keys()) if isinstance(row, dict) else []
    if len(kinds) > 1:
        raise DataError(f"it has {' and '.join(kinds)}: a row has one of them")
    if kinds and kinds != ["user"] and "system" in row:
        raise DataError(f"it has system, which goes with user, and not with {kinds[0]}")
    match row:
        case DataError():
            raise row
        case {"messages": _}:
            messages = OpenAIToMessages()(row)
            if not messages:
                raise DataError("messages is empty")
            if messages[-1].role == "assistant":
                raise DataError("the last of the messages is the assistant's: nothing to answer")
            return tokenizer.tokenize_messages(messages, add_generation_prompt=True)[0]
        case {"prompt": prompt}:
            return tokenize_prompt(prompt, tokenizer)
        case {"user": user}:
            if not isinstance(user, str) or not user:
                raise DataError(f"user is {user!r}, not a text")
            if not isinstance(system := row.get("system"), str | None):
                raise DataError(f"system is {system!r}, not a text")
            return tokenize_prompt({"user": user, "system": system}, tokenizer)
    found = f"; this one has {', '.join(row) or 'nothing'}" if isinstance(row, dict) else ""
    raise DataError(
        f'a row is an object with "prompt", "messages", or "user" and perhaps "system"{found}'
    )


def warn_of_special_tokens(rows: list[dict[str, Any]], tokenizer: ModelTokenizer) -> None:
    """Say so if prompts have names of special tokens, which are text in them."""
    texts = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
    if found := [name for name in tokenizer.special_tokens if any(name in text for text in texts)]:
        log.warning(
            "prompt: %s is read as text, and not as a special token: a chat is prompt.user=... "
            "and prompt.system=..., or a row's messages",
            found[0],
        )


def check_row(row: dict[str, Any]) -> None:
    """Raise DataError for a row that cannot be written with its answer."""
    if taken := sorted(row.keys() & {"completion", "ended", "sample", "tokens", "logprobs"}):
        raise DataError(f"{', '.join(taken)}: the answer would replace it; rename it")
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"it cannot be written as JSON: {error}") from None


def answer(
    model: Decoder,
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    tokenizer: ModelTokenizer,
    batch_size: int,
    settings: dict[str, Any],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield, for each answer, how many tokens it has and the row with the answer in it."""
    samples = settings["num_samples"]
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for number, completion in enumerate(complete(model, batch, tokenizer, **settings)):
            found = completion.row
            answered = {**rows[start + number // samples], "completion": completion.text}
            if samples > 1:
                answered["sample"] = number % samples
            answered["ended"] = found.ended
            if settings["logprobs"]:
                answered |= {"tokens": found.tokens, "logprobs": found.logprobs}
            yield len(found.tokens), answered


def write(answers: Iterator[tuple[int, dict[str, Any]]]) -> tuple[int, bool]:
    """Print answers as they come; return their tokens and whether Ctrl-C ended them."""
    count, interrupted = 0, False
    try:
        for tokens, row in answers:
            count += tokens
            print(json.dumps(row, ensure_ascii=False), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    return count, interrupted


def bytes_per_token(model: Decoder) -> int:
    """Return the bytes of weights that a step reads: all but an embedding that is no head."""
    size = sum(stored_bytes(parameter) for parameter in model.parameters())
    size += sum(getattr(module, "nbytes", 0) for module in model.modules())  # packed ones
    if model.lm_head is not None:
        size -= sum(stored_bytes(parameter) for parameter in model.embed_tokens.parameters())
    return size


def stream(tokens: Iterator[int], text: TextStream) -> tuple[int, bool]:
    """Print tokens as they come; return how many there were and whether Ctrl-C ended them."""
    count, interrupted = 0, False
    try:
        for token in tokens:
            count += 1
            print(for_terminal(text.put(token)), end="", flush=True)
            if text.stopped:
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:  # an error is told on a line of its own
        print(for_terminal(text.flush()), flush=True)
    return count, interrupted


def for_terminal(text: str) -> str:
    """Return a text without what would steer a terminal, if it goes to one."""
    return printable(text) if sys.stdout.isatty() else text


def report(tokens: int, seconds: float, bytes_read: int | None, device: torch.device) -> None:
    """Log speed and memory in the words of torchtune's tutorials."""
    log.info("Time for inference: %.2f sec total, %.2f tokens/sec", seconds, tokens / seconds)
    if bytes_read is not None:
        log.info("Bandwidth achieved: %.2f GB/s", bytes_read * tokens / seconds / 1e9)
    log.info("Memory used: %.2f GB", peak_memory_gb(device))
