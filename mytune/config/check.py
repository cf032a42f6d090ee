"""The check of components against what they name: arguments, their types, files that must exist."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import escape, glob
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING

from mytune.config.components import is_from_us_or_torch, refusal
from mytune.config.redact import redact
from mytune.config.signatures import annotation, fits, read_parameters
from mytune.config.torchtune import our_name
from mytune.config.typed import as_list, in_words
from mytune.config.types import KEY, Component, components, dotted
from mytune.errors import TuneError, did_you_mean

if TYPE_CHECKING:
    from mytune.config.load import LoadedConfig

# Arguments of our components that name a file or folder which must be there before a run starts.
_INPUTS = ["checkpoint_dir", "path", "special_tokens_path", "adapter_checkpoint"]
_DOWNLOAD = "`tune download REPO --output-dir DIR` fetches models"
_ADAPTER = "adapter_config.json"  # by which PEFT's folders are known
_MODELS = ("config.json", "params.json")  # by which whole models are
_SOURCES = {"adapter_checkpoint": "a LoRA run writes its adapters to output_dir/epoch_N/adapter"}
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_READERS = ("json", "csv", "parquet", "text")  # a dataset's `source` whose `data_files` are local

# Names that a recipe's own keys can have, of packages that we know, and one of them.
_KINDS = {
    "model": ("mytune.models.*[!r]", "mytune.models.llama3.llama3_8b"),  # no tokenizer
    "tokenizer": ("mytune.*okenizer", "mytune.models.llama3.llama3_tokenizer"),
    "checkpointer": ("mytune.training.*Checkpointer", "mytune.training.FullModelHFCheckpointer"),
    "dataset": ("mytune.datasets.*_dataset", "mytune.datasets.alpaca_dataset"),
    "dataset_val": ("mytune.datasets.*_dataset", "mytune.datasets.alpaca_dataset"),
    "metric_logger": ("mytune.training.*Logger", "mytune.training.metric_logging.DiskLogger"),
    "profiler": ("mytune.training.*profiler", "mytune.training.setup_torch_profiler"),
}

Finding = tuple[str, str]  # an argument's name, what is wrong with it


def check_components(loaded: LoadedConfig, *, files: bool = True) -> list[str]:
    """Return what is wrong with the components: unknown ones, arguments, missing files if `files`.

    Imports what is named, except Python files below the current directory: those are read, not run.
    """
    tree, supplied, problems = loaded.tree, loaded.schema.supplied, []
    for path, node in components(loaded.resolved):
        if not isinstance(node[KEY], str) or refusal(node[KEY]):
            continue  # `read_config` said so
        is_outer = len(path) == 1 or (len(path) == 2 and path[1].isdecimal())
        by_recipe: list[str] | None = []
        if is_outer:
            by_recipe = None if supplied is None else supplied.get(path[0], [])
        kind = _KINDS.get(path[0]) if is_outer else None
        for argument, text in _check(node, kind, by_recipe, files):
            key = (*path, argument)
            if key not in tree.broken:
                problems.append(redact(f"{tree.where(key)}: {dotted(key)}: {text}"))
    return problems


def _check(
    node: Component, kind: tuple[str, str] | None, by_recipe: list[str] | None, files: bool
) -> Iterator[Finding]:
    try:
        parameters = read_parameters(node[KEY])
    except TuneError as error:
        yield KEY, error.message
        return
    if kind and is_from_us_or_torch(node[KEY]) and not fnmatchcase(node[KEY], kind[0]):
        yield KEY, f"{node[KEY]} is of another kind than what goes here, such as {kind[1]}"
        return
    if parameters is not None:
        yield from _check_arguments(node, parameters, by_recipe)
    if not node[KEY].startswith("mytune."):
        return
    template = node.get("prompt_template")
    if isinstance(template, str) and (why := refusal(our_name(template))):
        yield "prompt_template", why
    if files:
        yield from _check_files(node)


def _check_arguments(
    node: Component, parameters: list[Parameter], by_recipe: list[str] | None
) -> Iterator[Finding]:
    """`by_recipe` is what the recipe adds; None if it does not say: nothing is missing then."""
    short = node[KEY].rpartition(".")[2]
    takes_all = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    starred = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    named = {p.name: p for p in parameters if p.kind not in starred}
    added = list(named)[:1] + by_recipe[1:] if by_recipe else []
    for key, value in node.items():
        if key in added:
            yield key, f"the recipe itself gives {short} this argument: remove it"
        elif key in named and not fits(value, named[key]):
            kind = annotation(named[key])
            yield key, f"{value!r} is not {in_words(kind)}{as_list(kind, value)}"
        elif key not in named and key != KEY and not takes_all:
            taken = [name for name in named if name not in added]
            near = did_you_mean(key, taken) or f"; it takes {', '.join(taken) or 'none'}"
            yield key, f"{short} takes no argument {key!r}{near}"
    for key in added if not takes_all else ():
        if key not in named:
            yield (
                KEY,
                f"{short} does not take {key!r}, which the recipe gives: name another component",
            )
    for key, parameter in named.items() if by_recipe is not None else ():
        if parameter.default is Parameter.empty and key not in {*node, *added}:
            yield KEY, f"{short} needs the argument {key!r}"


def adapters_in(folder: Path) -> list[Path]:
    """Return where an adapter is: the folder itself, or `adapter` in it, as runs save it."""
    return [each for each in (folder, folder / "adapter") if (each / _ADAPTER).is_file()]


def base_of(adapter: Path) -> str:
    """Return the directory of an adapter's base model, if its settings name one that is here."""
    try:
        base = json.loads((adapter / _ADAPTER).read_text())["base_model_name_or_path"]
        return base if Path(base).is_dir() else "BASE"
    except (ValueError, KeyError, TypeError, OSError):
        return "BASE"


def _repair(key: str, missing: Path) -> str:
    """Return what may be meant: an adapter's base, or what is near; or the files' source."""
    folder = missing.parent
    adapters = adapters_in(folder)
    if adapters and not any((folder / each).is_file() for each in _MODELS):
        keys = (
            f"checkpoint_dir={base_of(adapters[0])} checkpointer.adapter_checkpoint={adapters[0]}"
        )
        return f"; {adapters[0]} is an adapter: checkpointer.{keys}"
    return _near(missing) or f"; {_SOURCES.get(key, _DOWNLOAD)}"


def _near(missing: Path) -> str:
    """Return what may be meant: the same name one folder below, or a neighbour."""
    below = sorted(map(str, missing.parent.glob(f"*/{escape(missing.name)}")))
    near = did_you_mean(missing.name, [each.name for each in missing.parent.glob("*")])
    return f"; did you mean {below[0]!r}?" if below else near


def _check_files(node: Component) -> Iterator[Finding]:
    """Inputs are found from the current directory, or in `checkpoint_dir` or `output_dir`."""
    folders = ["", *(str(node[key]) for key in ("checkpoint_dir", "output_dir") if node.get(key))]
    for key in _INPUTS:
        value = node.get(key)
        if not isinstance(value, str):
            continue
        places = [Path(os.path.expanduser(Path(folder, value))) for folder in folders]
        places += [place.parent / "original" / place.name for place in places if key == "path"]
        if not any(place.exists() for place in places):
            yield key, f"{value!r} does not exist{_repair(key, places[0])}"
        elif key == "checkpoint_dir" and places[0].is_file():
            yield key, f"{value!r} is a file; name the folder that it is in"
    keys = ["source", "data_files"] if node.get("source") in _READERS else ["source"]
    for key in keys:
        value = node.get(key)
        for each in value if isinstance(value, list) else [value]:
            is_local = isinstance(each, str) and each.endswith(_DATA_SUFFIXES) and "://" not in each
            file = os.path.expanduser(str(each))
            if is_local and not glob(file, recursive=True):
                here = "" if os.path.isabs(file) else f" in {os.getcwd()}"
                yield key, f"{each!r} does not exist{here}{_near(Path(file))}"
