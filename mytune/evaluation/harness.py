"""Evaluation: a model's results on tasks, whole or as numbers for metric loggers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import torch

from mytune.evaluation.answers import KeptAnswers
from mytune.evaluation.batches import EvaluationStopped
from mytune.evaluation.chat_template import ChatTemplate
from mytune.evaluation.tasks import Tasks, fault_of_task
from mytune.modules.decoder import Decoder
from mytune.tokenizers.base import ModelTokenizer
from mytune.training.distributed import rank
from mytune.training.sharding import reshard
from mytune.training.signals import StopSignal

Results = dict[str, Any]


def evaluate(
    model: Decoder,
    tokenizer: ModelTokenizer,
    tasks: Tasks,
    *,
    limit: float | None = None,
    batch_size: int | str = "auto",
    max_seq_length: int | None = None,
    chat_template: bool | ChatTemplate = False,
    fewshot_as_multiturn: bool = False,
    system_instruction: str | None = None,
    seed: int = 1234,
    bootstrap_iters: int = 100_000,
    log_samples: bool = False,
    stop: StopSignal | None = None,
    kept: KeptAnswers | None = None,
) -> Results:
    """Return the harness's results: `results` by task and metric, `versions`, `n-shot` and more.

    Every rank must call it. Scores are known to all, standard errors that need a bootstrap to
    rank 0 alone.

    Args:
        model: in eval mode.
        tasks: what `load_tasks` returned.
        limit: documents per task; below 1, a share of them.
        batch_size: rows at once, or "auto".
        max_seq_length: tokens of context and continuation; if None, all that the model takes.
        chat_template: put questions, and examples, into the tokenizer's chat format, or this one.
        fewshot_as_multiturn: with it, examples are turns of their own.
        system_instruction: a system message, or a text before all else.
        seed: of few-shot examples that are drawn, and of generation that samples.
        bootstrap_iters: of standard errors without a formula; 0 leaves them out.
        log_samples: return `samples` too: of each task every document, its answers and its scores.
        stop: ends the evaluation, between two batches.
        kept: answers that are known, and where new ones are kept; not with a sharded model.

    Raises:
        EvaluationStopped: `stop` was requested.
        DataError: a document that the harness can make nothing of.
    """
    import lm_eval

    from mytune.evaluation.adapter import HarnessModel

    adapter = HarnessModel(
        model,
        tokenizer,
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        chat_template=chat_template if isinstance(chat_template, ChatTemplate) else None,
        seed=seed,
        stop=stop,
        kept=kept,
    )
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=seed)  # anew: drawing has moved it on
    logging.getLogger("lm_eval").setLevel(logging.WARNING)  # of documents that are odd
    try:
        with redirect_stdout(sys.stderr):  # the harness prints; stdout is for results
            results: Results = lm_eval.evaluate(
                adapter,
                tasks,
                limit=limit,
                bootstrap_iters=0 if rank() else bootstrap_iters,
                log_samples=log_samples,
                system_instruction=system_instruction,
                apply_chat_template=bool(chat_template),
                fewshot_as_multiturn=fewshot_as_multiturn,
            )
    except Exception as error:
        if told := fault_of_task(error):
            raise told from error
        raise
    return results


def evaluate_scores(
    model: Decoder,
    tokenizer: ModelTokenizer,
    tasks: Tasks,
    **settings: Any,
) -> dict[str, float] | None:
    """Return `eval/TASK/METRIC` of a model in training, which stays in training mode.

    The name of a filter of answers follows the metric's, unless it is "none".

    Compiled blocks run eagerly: texts of ever new lengths would use up their recompilations.
    None is returned if `stop` was requested before the end.

    Args:
        settings: further arguments of `evaluate`.
    """
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            results = evaluate(model, tokenizer, tasks, bootstrap_iters=0, **settings)["results"]
    except EvaluationStopped:
        return None
    finally:
        reshard(model)
        model.train()
    return {
        f"eval/{task}/{name.removesuffix(',none').replace(',', '/')}": value
        for task, metrics in results.items()
        for name, (value, _) in measured(metrics).items()
    }


def measured(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return a task's metrics by `METRIC,FILTER`, with their standard errors if they are known."""
    found: dict[str, tuple[float, float | None]] = {}
    for name, value in metrics.items():
        metric, comma, of_filter = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{of_filter}")
        found[name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return found
