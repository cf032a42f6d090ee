"""The check of components against what they name: arguments, their types, files that must exist."""

from __future__ import annotations

from collections.abc import Iterator
from glob import glob
from inspect import Parameter
from pathlib import Path as File
from typing import TYPE_CHECKING

from mytune.config.instantiate import refusal
from mytune.config.redact import redact
from mytune.config.schema import Supplied
from mytune.config.signatures import annotation, fits, read_parameters
from mytune.config.types import KEY, Component, components, dotted
from mytune.errors import TuneError, did_you_mean

if TYPE_CHECKING:
    from mytune.config.load import LoadedConfig

# Arguments of our components that name a file or folder which must be there before a run starts.
_INPUTS = [
    "checkpoint_dir",
    "path",
    "special_tokens_path",
    "merges_file",
    "merges_path",
    "vocab_path",
    "adapter_checkpoint",
]
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_READERS = ("json", "csv", "parquet", "text")  # a dataset's `source` whose `data_files` are local

Finding = tuple[str, str]  # an argument's name, what is wrong with it


def check_components(loaded: LoadedConfig, *, files: bool = True) -> list[str]:
    """Return what is wrong with the components: unknown ones, arguments, missing files if `files`.

    Imports what is named, except Python files below the current directory: those are read, not run.
    """
    tree, problems = loaded.tree, []
    for path, node in components(loaded.resolved):
        if not isinstance(node[KEY], str) or refusal(node[KEY]):
            continue  # `read_config` said so
        first = len(path) == 1 or (len(path) == 2 and path[1].isdecimal())
        nested = Supplied(0, frozenset(), more=False)
        findings = _check(node, loaded.schema.supplied.get(path[0]) if first else nested, files)
        for argument, text in findings:
            key = (*path, argument)
            if key not in tree.broken:
                problems.append(redact(f"{tree.where(key)}: {dotted(key)}: {text}"))
    return problems


def _check(node: Component, supplied: Supplied | None, files: bool) -> Iterator[Finding]:
    try:
        parameters = read_parameters(node[KEY])
    except TuneError as error:
        yield KEY, error.message
        return
    if parameters is not None:
        yield from _check_arguments(node, parameters, supplied)
    if files and node[KEY].startswith("mytune."):
        yield from _check_files(node)


def _check_arguments(
    node: Component, parameters: list[Parameter], supplied: Supplied | None
) -> Iterator[Finding]:
    """`supplied` is what the recipe adds; None where that cannot be seen: nothing is missing then."""
    short = node[KEY].rpartition(".")[2]
    takes_all = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    starred = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    named = {p.name: p for p in parameters if p.kind not in starred}
    by_recipe = list(named)[: supplied.positional] if supplied else []
    for key, value in node.items():
        if key in by_recipe:
            yield key, f"the recipe itself gives {short} this argument: remove it"
        elif key in named and not fits(value, named[key]):
            yield key, f"{value!r} is not {annotation(named[key])}"
        elif key not in named and key != KEY and not takes_all:
            near = did_you_mean(key, named.keys() - set(by_recipe))
            yield key, f"{short} takes no argument {key!r}{near}"
    if supplied is None or supplied.more:
        return
    for key in sorted(supplied.keywords - named.keys()) if not takes_all else ():
        yield KEY, f"{short} does not take {key!r}, which the recipe gives: name another component"
    given = {*node, *by_recipe, *supplied.keywords}
    for key, parameter in named.items():
        if parameter.default is Parameter.empty and key not in given:
            yield KEY, f"{short} needs the argument {key!r}"


def _check_files(node: Component) -> Iterator[Finding]:
    """Inputs may be given from the current directory, or within `checkpoint_dir` or `output_dir`."""
    folders = ["", *(str(node[key]) for key in ("checkpoint_dir", "output_dir") if node.get(key))]
    for key in _INPUTS:
        value = node.get(key)
        if isinstance(value, str) and not any(File(folder, value).exists() for folder in folders):
            how = "`tune download REPO --output-dir DIR` fetches models"
            yield key, f"{value!r} does not exist; {how}"
    keys = ["source", "data_files"] if node.get("source") in _READERS else ["source"]
    for key in keys:
        value = node.get(key)
        for each in value if isinstance(value, list) else [value]:
            is_local = isinstance(each, str) and each.endswith(_DATA_SUFFIXES) and "://" not in each
            if is_local and not glob(str(each), recursive=True):
                yield key, f"{each!r} does not exist"
