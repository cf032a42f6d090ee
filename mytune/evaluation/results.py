"""Results for people and programs: the harness's table, JSON, a Markdown summary, a comparison."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from mytune import versions
from mytune.errors import CheckpointError, ConfigError
from mytune.evaluation.harness import Results, measured
from mytune.training.checkpointing.files import read_json
from mytune.training.disk import write_atomic, writing
from mytune.training.distributed import rank

log = logging.getLogger("mytune")

JSON, MARKDOWN = "evaluation.json", "evaluation.md"
SAMPLES = {
    "samples": "evaluation_samples.jsonl",
    "samples of the base": "evaluation_samples_base.jsonl",
}
# Keys of the recipe that change scores, and that the harness's results do not tell.
_SETTINGS = (
    "chat_template fewshot_as_multiturn system_instruction max_seq_length dtype seed".split()
)
_COMPARED = ("versions", "n-shot", "n-samples")
_NO_RESULTS = (
    CheckpointError,
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    KeyError,
    RecursionError,
    TypeError,
)
_KEPT = "results groups group_subtasks versions n-shot n-samples higher_is_better".split()


def results_table(results: Results) -> str:
    """Return the harness's own table, and that of its groups if there are any."""
    from lm_eval.utils import make_table

    columns = ["results", *(["groups"] if results.get("groups") else [])]
    return "\n".join(make_table(results, column) for column in columns)


def compare_results(base: Results, tuned: Results) -> str:
    """Return a Markdown table of what both measured, side by side with standard errors.

    The last column is the change and, in brackets, how many standard errors of a difference it is.
    """
    rows = [
        ["Tasks", "Metric", "", "Base", "", "Fine-tuned", "", "Change"],
        ["---", "---", "---", "---:", "---:", "---:", "---:", "---:"],
        *_compared(base, tuned),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differing(base: Results, tuned: Results, config: str) -> list[str]:
    """Return how two results were not measured alike, by setting and by task.

    Args:
        base: results of this run, or what `read_results` returned.
        config: YAML of this run's config.
    """
    found = [
        f"{task}: there are no results for the base"
        for task in tuned["results"]
        if task not in base["results"]
    ]
    now, earlier = yaml.safe_load(config), base.get("config", {})  # none is of this run
    found += [
        f"{key} was {earlier[key]} for the base and is {now[key]}"
        for key in _SETTINGS
        if key in earlier.keys() & now.keys() and earlier[key] != now[key]
    ]
    return found + [
        f"{task}: {what} was {_countable(before)} for the base and is {_countable(after)}"
        for what in _COMPARED
        for task, after in tuned.get(what, {}).items()
        if _countable(before := base.get(what, {}).get(task, after)) != _countable(after)
    ]


def _countable(value: Any) -> Any:
    """Return a number as it is, and of the harness's counts how many were measured."""
    return value.get("effective", value) if isinstance(value, dict) else value


def _compared(base: Results, tuned: Results) -> Iterator[list[str]]:
    for task, metrics in tuned["results"].items():
        for name, (after, error) in measured(metrics).items():
            found = measured(base["results"].get(task, {})).get(name)
            if found is None:
                continue
            before, before_error = found
            change = f"{after - before:+.4f}"
            if spread := math.hypot(error or 0.0, before_error or 0.0):
                change += f" ({(after - before) / spread:+.1f} se)"
            arrow = {True: "↑", False: "↓"}.get(
                tuned["higher_is_better"].get(task, {}).get(name.partition(",")[0]), ""
            )
            metric = name.removesuffix(",none").replace(",", " ")
            yield [
                task,
                metric,
                arrow,
                *_cells(before, before_error),
                *_cells(after, error),
                change,
            ]


def _cells(value: float, error: float | None) -> tuple[str, str]:
    return f"{value:.4f}", "" if error is None else f"± {error:.4f}"


def write_results(
    output_dir: str | Path,
    results: Results,
    config: str,
    base: Results | None = None,
    *,
    again: bool = False,
) -> dict[str, Path]:
    """Write `evaluation.json` and `evaluation.md`, on rank 0 only; return their paths by name.

    If there are samples, `evaluation_samples.jsonl` has them, one to a line, and
    `evaluation_samples_base.jsonl` those of the base. Files of earlier runs stay, under names with
    a number.

    Args:
        config: YAML of the recipe's config, to be kept with the results.
        base: results of the base model, if it was measured too.
        again: what is there is of this run, and can be replaced.
    """
    if rank():
        return {}
    folder = Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    software = versions("lm_eval", "torch")
    kept = {name: results[name] for name in _KEPT if name in results}
    held = {**kept, "base": base and base["results"], "config": config, "software": software}
    written = {"results": folder / JSON, "summary": folder / MARKDOWN}
    samples = {
        what: measured_by["samples"]
        for what, measured_by in zip(SAMPLES, (results, base or {}), strict=True)
        if "samples" in measured_by
    }
    written |= {what: folder / SAMPLES[what] for what in samples}
    text = json.dumps(held, indent=2, ensure_ascii=False, default=float)
    if not again:
        _keep({*written.values(), *(folder / name for name in SAMPLES.values())})
    write_atomic(written["results"], f"{text}\n".encode())
    parts = ["# Evaluation", results_table(results)]
    if base:
        parts += ["## Base and fine-tuned", compare_results(base, results)]
    told = ", ".join(f"{name} {number}" for name, number in software.items())
    parts += ["## Config", f"```yaml\n{config.strip()}\n```", f"Made with {told}."]
    write_atomic(written["summary"], ("\n\n".join(parts) + "\n").encode())
    for what, documents in samples.items():
        write_atomic(written[what], "".join(_lines(documents)).encode())
    return written


def _lines(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for task, documents in samples.items():
        for document in documents:
            said = {"task": task, **document}
            yield json.dumps(said, ensure_ascii=False, default=str) + "\n"


def _keep(files: Iterable[Path]) -> None:
    """Rename files that are there: the first to be kept of a name gets a 1, the next a 2."""
    there = [file for file in files if file.exists()]
    number = next(n for n in count(1) if not any(_numbered(file, n).exists() for file in there))
    for file in there:
        file.rename(_numbered(file, number))
        log.info("earlier results are kept as %s", _numbered(file, number))


def _numbered(file: Path, number: int) -> Path:
    return file.with_stem(f"{file.stem}_{number}")


def check_output(output_dir: str | Path, compare: str | None) -> None:
    """Refuse a folder that cannot be written, and to replace the results to compare with.

    Raises:
        ConfigError: it is the folder of the results to compare with, or those are to be read from
            a folder that has no model.
        ResourceError: it cannot be made or written.
    """
    folder = Path(output_dir).expanduser()
    if compare is not None:
        base = Path(compare).expanduser()
        if base.resolve() == (folder / JSON).resolve():
            raise ConfigError(
                f"compare names {folder / JSON}, and the results of this run would take its name: "
                "choose another output_dir"
            )
        held = [name for name in ("config.json", "params.json", JSON) if (base / name).is_file()]
        if held == [JSON]:
            raise ConfigError(f"compare: {base} holds no model, but results: compare={base / JSON}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def read_results(path: str | Path, tasks: Collection[str]) -> Results:
    """Read an earlier run's `evaluation.json`, to be compared with results of `tasks`.

    Raises:
        ConfigError: it is something else, or has other tasks.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise ConfigError(f"compare: {file} does not exist")
    try:
        found: Results = read_json(file)
        for metrics in found["results"].values():
            measured({str(name): value for name, value in metrics.items()})
        config = yaml.safe_load(found.get("config", ""))
        said = config.items() if isinstance(config, dict) else ()
        found["config"] = {k: v for k, v in said if isinstance(v, str | int | float | None)}
        for what in _COMPARED:
            found[what] = found[what] if isinstance(found.get(what), dict) else {}
    except _NO_RESULTS as error:
        raise ConfigError(
            f"compare: {file} holds no results of an earlier evaluation; it must be a checkpoint "
            f"directory, or the {JSON} of an earlier run"
        ) from error
    if not found["results"].keys() & set(tasks):
        raise ConfigError(
            f"compare: {file} has results of {', '.join(found['results'])}, and of none of "
            f"{', '.join(tasks)}: there would be nothing to compare"
        )
    return found
