"""Evaluate a model with EleutherAI's harness: base, fine-tuned, quantized, or base and adapter.

    tune run eleuther_eval --config eleuther_evaluation tasks='[truthfulqa_mc2]'
    tune run eleuther_eval --config eleuther_evaluation --compare /tmp/Meta-Llama-3-8B-Instruct
    tune run --nproc_per_node 2 eleuther_eval --config eleuther_evaluation

The table goes to stdout, everything else to stderr and to output_dir. Copy it with
`tune cp eleuther_eval my_eval.py` and change what you like.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mytune.config import Component, check_may_run, config_yaml, instantiate
from mytune.errors import ConfigError
from mytune.evaluation import (
    KeptAnswers,
    check_batch_size,
    check_limit,
    check_lm_eval,
    check_output,
    check_tasks,
    compare_results,
    differing,
    evaluate,
    load_tasks,
    read_chat_template,
    read_results,
    results_table,
    write_results,
)
from mytune.generation import pack_linears
from mytune.modules import Decoder, adapter_state, make_plain
from mytune.tokenizers import ModelTokenizer, check_vocabulary
from mytune.training import (
    get_device,
    get_dtype,
    load_for_inference,
    log,
    peak_memory_gb,
    process_group,
    rank,
    set_deterministic,
    set_seed,
    setup_logging,
    use_fast_float32_matmul,
)

# The recipe hands nothing to components itself: a config names all that they need.
SUPPLIED: dict[str, list[str]] = {}


@dataclass(kw_only=True)
class Config:
    """Every key of an evaluation config."""

    # Where evaluation.json and evaluation.md go.
    output_dir: str = "."

    # Builder of the model; an adapter needs no builder of its own.
    model: Component
    # Tokenizer and its file.
    tokenizer: Component
    # Which files hold the weights; adapter_checkpoint names a PEFT adapter to use with them.
    checkpointer: Component
    # Evaluate this checkpoint directory too, or read evaluation.json of an earlier run, to compare.
    compare: str | None = None

    # Tasks, groups and tags of lm_eval, or your own.
    tasks: list[str] = field(default_factory=lambda: ["truthfulqa_mc2"])
    # A folder with YAML files of your own tasks; functions that these name are run.
    include_path: str | None = None
    # Documents per task, the first ones; below 1 a share of them; null for all.
    limit: float | None = None
    # Examples before each question, instead of the tasks' own numbers.
    num_fewshot: int | None = None
    # Put questions into the tokenizer's chat format, or that of a checkpoint directory's template.
    chat_template: bool | str = False
    # With chat_template: examples are turns of their own, not one text.
    fewshot_as_multiturn: bool = False
    # A system message, or a text before every question.
    system_instruction: str | None = None
    # Longest context and answer, in tokens; the beginning of longer ones is left out.
    max_seq_length: int | None = None
    # Rows at once, or auto.
    batch_size: int | str = 8
    # Quantize the loaded weights (the base too); null for a checkpoint that is quantized already.
    quantizer: Component | None = None
    # Write every document with its answers and scores, too, to evaluation_samples.jsonl.
    log_samples: bool = False
    # Seed of few-shot examples that are drawn, and of generation that samples.
    seed: int = 1234

    # cuda, cuda:1, cpu, mps or xpu.
    device: str = "cuda"
    # Of weights and computation: bf16 or fp32.
    dtype: str = "bf16"
    # Deterministic kernels: default, warn, or error where there is none.
    cudnn_deterministic_mode: str | int | None = None
    # DEBUG, INFO, WARNING or ERROR.
    log_level: str = "INFO"


def main(cfg: Config) -> None:
    """Load tasks, load the model, evaluate, report; then the same for what it is compared with."""
    setup_logging(cfg.log_level, rank())
    check(cfg)
    device = get_device(cfg.device)
    dtype = get_dtype(cfg.dtype, device)
    set_deterministic(cfg.cudnn_deterministic_mode)
    use_fast_float32_matmul(device)
    set_seed(cfg.seed)

    with process_group(device):
        # Tasks and earlier results before weights: it is quicker to be found wrong.
        tokenizer = instantiate(cfg.tokenizer)
        checkpointer = instantiate(cfg.checkpointer)
        base = base_checkpointer(cfg)
        log.info("Looking up tasks and loading their data")
        tasks = load_tasks(cfg.tasks, cfg.include_path, cfg.num_fewshot)
        log.info("Running evaluation on the following tasks: %s", list(cfg.tasks))
        earlier = read_results(cfg.compare, tasks["tasks"]) if cfg.compare and not base else None

        tokenizers = [tokenizer, *([base_tokenizer(cfg, tokenizer)] if base else [])]
        with torch.device("meta"):
            models = [instantiate(cfg.model), *([base_model(cfg)] if base else [])]
        for each, its in zip(models, tokenizers, strict=True):
            check_vocabulary(its, each.config.vocab_size)
            positions = each.config.max_seq_len
            if (cfg.max_seq_length or 0) > positions:
                log.warning("max_seq_length: %d, all positions that the model has", positions)
            check_tasks(tasks, min(cfg.max_seq_length or positions, positions))
        # A model is let go of once it is measured: there may be no room for two.
        results, kept = measure(cfg, models.pop(0), checkpointer, tokenizer, tasks, device, dtype)
        unfinished = [kept]
        if base:
            write_results(cfg.output_dir, results, config_yaml(cfg))  # what comes may fail
            log.info("Results so far are in %s; evaluating %s", cfg.output_dir, cfg.compare)
            earlier, kept = measure(cfg, models.pop(), base, tokenizers[1], tasks, device, dtype)
            unfinished.append(kept)
        report(cfg, results, earlier, again=bool(base))
        for kept in unfinished:
            kept.remove()


def check(cfg: Config) -> None:
    """Refuse what can be known to be wrong before anything is loaded."""
    check_lm_eval()
    check_batch_size(cfg.batch_size)
    check_output(cfg.output_dir, cfg.compare)
    read_chat_template(cfg.chat_template)
    check_may_run(cfg.tasks, cfg.include_path)
    check_limit("limit", cfg.limit)
    if cfg.max_seq_length is not None and not cfg.max_seq_length > 0:
        raise ConfigError(f"max_seq_length is {cfg.max_seq_length}; it must be above 0, or null")
    if cfg.fewshot_as_multiturn and not cfg.chat_template:
        raise ConfigError("fewshot_as_multiturn needs chat_template=true")
    if cfg.num_fewshot is not None and cfg.num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {cfg.num_fewshot}; it must be 0 or more, or null")


def base_checkpointer(cfg: Config) -> Any:
    """Return the checkpointer of the base to compare with, if `compare` names a directory."""
    if cfg.compare is None or not Path(cfg.compare).expanduser().is_dir():
        return None
    other = {"checkpoint_dir": cfg.compare, "checkpoint_files": None, "adapter_checkpoint": None}
    return instantiate({**cfg.checkpointer, **other})


def base_model(cfg: Config) -> Decoder:
    """Return the base's model: of its own sizes where a directory tells them, without adapters."""
    if "checkpoint_dir" in cfg.model:
        base: Decoder = instantiate({**cfg.model, "checkpoint_dir": cfg.compare})
    else:
        base = instantiate(cfg.model)
    if adapter_state(base):
        make_plain(base)
    return base


def base_tokenizer(cfg: Config, tokenizer: ModelTokenizer) -> ModelTokenizer:
    """Return the base's tokenizer: from its own files, if its directory has some of these names."""
    names = {key: Path(str(cfg.tokenizer.get(key))).name for key in ("path", "special_tokens_path")}
    files = {key: Path(str(cfg.compare)).expanduser() / name for key, name in names.items()}
    own = {key: str(file) for key, file in files.items() if file.is_file()}
    return instantiate({**cfg.tokenizer, **own}) if own else tokenizer


def measure(
    cfg: Config,
    model: Decoder,
    checkpointer: Any,
    tokenizer: ModelTokenizer,
    tasks: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], KeptAnswers]:
    """Fill a model on the meta device with weights; return its results, and what is kept of them.

    Answers are kept until all results are written: the same command goes on with them.
    """
    model = load_for_inference(
        model,
        checkpointer,
        device,
        dtype,
        merge_adapter=False,
        quantizer=instantiate(cfg.quantizer),
    )
    kept = KeptAnswers(cfg.output_dir, model, __file__)
    pack_linears(model, rows=512)  # most of what is read are texts, not single tokens
    started = time.perf_counter()
    try:
        results = evaluate(
            model,
            tokenizer,
            tasks,
            limit=cfg.limit,
            batch_size=cfg.batch_size,
            max_seq_length=cfg.max_seq_length,
            chat_template=read_chat_template(cfg.chat_template),
            fewshot_as_multiturn=cfg.fewshot_as_multiturn,
            system_instruction=cfg.system_instruction,
            seed=cfg.seed,
            log_samples=cfg.log_samples,
            kept=kept,
        )
    except KeyboardInterrupt:
        if kept.file:
            log.info("stopped: the same command goes on from here")
        raise
    log.info("Eval completed in %.2f seconds.", time.perf_counter() - started)
    log.info("Max memory allocated: %.2f GB", peak_memory_gb(device))
    return results, kept


def report(
    cfg: Config, results: dict[str, Any], base: dict[str, Any] | None, *, again: bool
) -> None:
    """Write the tables, print them and say where they are."""
    written = write_results(cfg.output_dir, results, config_yaml(cfg), base, again=again)
    if rank() == 0:
        print(results_table(results), flush=True)
        if base:
            print(compare_results(base, results), flush=True)
            for line in differing(base, results, config_yaml(cfg)):
                log.warning("not measured alike: %s", line)
    for what, path in written.items():
        log.info("%s: %s", what, path)
