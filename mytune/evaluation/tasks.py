"""Tasks of EleutherAI's harness, found by name, the user's own before those that it brings."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mytune._interrupts import ctrl_c_ends_at_once
from mytune.errors import (
    ConfigError,
    DataError,
    ResourceError,
    UnreachableError,
    did_you_mean,
    first_line,
    is_network,
)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

log = logging.getLogger("mytune")

Tasks = dict[str, Any]  # what TaskManager.load returns: tasks, groups and who belongs to which


def check_lm_eval() -> None:
    """Raise ResourceError where EleutherAI's harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError(
            "evaluation needs the package lm_eval, which is not installed: "
            "pip install 'lm_eval>=0.4.13'"
        )


def check_limit(key: str, limit: float | None) -> None:
    """Raise ConfigError unless a limit is a number of documents, a share of them below 1, or None.

    Args:
        key: what it is called in the config.
    """
    if limit is not None and not limit > 0:
        raise ConfigError(f"{key} is {limit}; it must be above 0, or null")
    if limit is not None and limit > 1 and limit % 1:
        raise ConfigError(f"{key} is {limit}; above 1 it is a number of documents, and whole")


def load_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    prefix: str = "",
) -> Tasks:
    """Load tasks, groups and tags of the harness, with their data.

    Args:
        names: as `tune run eleuther_eval` takes them; a path of a YAML file is one too.
        include_path: a folder of YAML files with tasks of one's own.
        num_fewshot: examples before each question, instead of the tasks' own numbers; a task that
            says 0 keeps it.
        prefix: with what the config's keys `tasks` and `include_path` begin.

    Raises:
        ResourceError: the harness is not installed, or data cannot be downloaded.
        ConfigError: unknown tasks, with the nearest names; a folder that is not there.
        DataError: a task whose data cannot be loaded.
    """
    check_lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of its own defaults
    if not names:
        raise ConfigError(f"{prefix}tasks is empty; name at least one, such as truthfulqa_mc2")
    if include_path is not None and not os.path.isdir(os.path.expanduser(include_path)):
        raise ConfigError(f"{prefix}include_path: there is no directory {include_path}")
    manager = _manager(names, include_path, prefix)
    loaded: Tasks = {}
    for part in (_load(manager, name, prefix) for name in dict.fromkeys(names)):
        for kind, held in part.items():
            loaded.setdefault(kind, {}).update(held)
    for task in loaded["tasks"].values():
        _set_fewshot(task, num_fewshot)
    return loaded


def check_tasks(tasks: Tasks, positions: int, ranks: int = 1) -> None:
    """Find tasks that would fail once the model is asked, before its weights are loaded.

    Args:
        positions: of the longest context and answer together, in tokens.
        ranks: how many share the model's weights, each with texts of its own.

    Raises:
        ConfigError: naming all of them.
    """
    problems = [
        f"{name} {problem}"
        for name, task in tasks["tasks"].items()
        for problem in _problems(task, positions, ranks)
    ]
    if len(problems) == 1:
        raise ConfigError(f"task {problems[0]}")
    if problems:
        raise ConfigError(f"{len(problems)} tasks cannot be measured", problems)


def _problems(task: Any, positions: int, ranks: int) -> Iterator[str]:
    from mytune.evaluation.adapter import read_generation

    if getattr(task, "UNSAFE_CODE", False):
        yield "runs code that the model writes, which is not supported"
    if getattr(task, "MULTIMODAL", False):
        yield "shows pictures or plays sounds, which is not supported"
    metrics = getattr(task, "_metric_fn_list", {})
    if "bypass" in metrics:
        yield "has no score (its metric is bypass)"
    for name, function in metrics.items():
        if function is None and task.get_config("process_results") is None:
            yield f"has the metric {name}, which lm_eval does not know"
        elif task.aggregation().get(name, sum) is None:  # what it lacks is averaged
            yield f"has the metric {name} with an aggregation that lm_eval does not know"
    if task.OUTPUT_TYPE == "generate_until":
        if ranks > 1:
            yield (
                "generates text, which ranks that share a model cannot do while training; "
                "evaluate a checkpoint with eleuther_eval instead"
            )
        try:
            most, *_ = read_generation(task.get_config("generation_kwargs") or {})
        except ConfigError as error:
            yield f"has {error}"
        else:
            if most >= positions:
                yield (
                    f"generates up to {most} tokens, and max_seq_length (or the model) has room "
                    f"for {positions}, with the question"
                )


def fault_of_task(error: Exception) -> DataError | None:
    """Return what to tell if the harness could not make a request, or a score, of a document.

    It is known by the frames that the error came through: none is of the model's.
    """
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

    task = doc = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = frame.f_locals
        if isinstance(found.get("self"), LM):
            return None
        if isinstance(found.get("self"), Task):
            task, doc = found["self"], found.get("doc", doc)
    why = f"{type(error).__name__} ({_reason(error)})"
    if task is None:
        if not isinstance(error, TypeError | ValueError | LookupError | ArithmeticError):
            return None
        return DataError(
            f"lm_eval cannot score these tasks: {why}; does each metric fit its output_type?"
        )
    name = task.get_config("task")
    if str(error).startswith("Sample larger than population"):
        shots = task.get_config("num_fewshot")
        return DataError(f"task {name}: num_fewshot is {shots}, and it has fewer examples to show")
    return DataError(f"task {name}: lm_eval can make nothing of {_shown(doc)}: {why}")


def _shown(doc: Any, most: int = 200) -> str:
    text = "its documents" if doc is None else json.dumps(doc, default=str, ensure_ascii=False)
    return text if len(text) <= most else text[:most] + "..."


def _reason(error: BaseException) -> str:
    """Return the first line of what an error was raised for at first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0] or "it does not say why"


def _manager(
    names: Sequence[str], include_path: str | Path | None, prefix: str = ""
) -> TaskManager:
    """Return the index of all tasks, or of the user's alone if that suffices: it takes no time."""
    with ctrl_c_ends_at_once():
        from lm_eval.tasks import TaskManager

    folder = None if include_path is None else os.path.realpath(os.path.expanduser(include_path))
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= {*own.all_subtasks, *own.all_tags}:  # a group may hold others than these
            return own
    manager = TaskManager(include_path=folder)
    try:
        known = manager.all_tasks
    except TypeError:  # it sorts them
        raise ConfigError(
            f"{prefix}include_path: a task in {folder} has a name that is no text"
        ) from None
    files = {name for name in names if name.endswith(".yaml") and Path(name).is_file()}
    if unknown := [n for n in names if n not in known and n not in files]:
        if folder and (damaged := _not_yaml(Path(folder))):
            raise ConfigError(f"{prefix}include_path: {'; '.join(damaged)}")
        problems = [f"{name}{did_you_mean(name, known, most=3)}" for name in unknown]
        where = "" if folder else f"; {prefix}include_path names a folder with tasks of your own"
        raise ConfigError(f"{prefix}tasks: lm_eval has no {'; no '.join(problems)}{where}")
    return manager


def _not_yaml(folder: Path) -> list[str]:
    """Return the files that are no YAML, which the harness leaves out without a word, and why."""
    found = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}:{mark.line + 1}" if mark else str(file)
            problem = getattr(error, "problem", None) or first_line(error)
            found.append(f"{where}: not valid YAML: {problem}")
    return found


def _load(manager: TaskManager, name: str, prefix: str = "") -> Tasks:
    """Load a task and its data; what can go wrong there is not ours, but its reason can be told."""
    try:
        return dict(manager.load([name]))
    except Exception as error:
        reason = _reason(error)
        if isinstance(error, StopIteration):
            reason = "there are no rows"
        if isinstance(error, KeyError):
            unknown = "a metric of its metric_list is unknown, and has no aggregation of its own"
            reason = unknown if error.args == (None,) else f"there is no {reason}"
        if missing := _unknown_members(manager, name):
            near = did_you_mean(missing[0], manager.all_tasks, most=3)
            reason = f"it is a group of tasks, and lm_eval has no {missing[0]}{near}"
        if is_network(error):
            raise UnreachableError(
                f"task {name}: its data cannot be downloaded: {reason}; check the network "
                "(HF_HUB_OFFLINE), or name a task of yours over local files with "
                f"{prefix}include_path"
            ) from error
        raise DataError(f"task {name}: cannot be loaded: {reason}") from error


def _unknown_members(manager: TaskManager, name: str) -> list[str]:
    """Return the tasks that a group names and that there are not."""
    entry = manager.task_index.get(name)
    listed = (entry.cfg or {}).get("task") if entry else None
    members = listed if isinstance(listed, list) else []
    return [each for each in members if isinstance(each, str) and each not in manager.task_index]


def _set_fewshot(task: Any, number: int | None) -> None:
    own = task.get_config("num_fewshot")
    if number is None or own == 0:
        if number:
            log.warning("task %s keeps its num_fewshot of 0", task.task_name)
        number = own or 0
    task.set_config(key="num_fewshot", value=number)
