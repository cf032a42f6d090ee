"""The check of components against what they name: arguments, types, files that have to exist."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Iterator
from glob import glob
from inspect import Parameter
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from mytune.config.instantiate import find_component, local_file, refusal
from mytune.config.redact import redact
from mytune.config.schema import Supplied, parse_hint
from mytune.config.types import KEY, Component, Path, components, dotted
from mytune.errors import ConfigError, TuneError, did_you_mean

if TYPE_CHECKING:
    from mytune.config.load import LoadedConfig

# Arguments of ours that name a file or folder which must be there before a run starts.
_INPUTS = ("checkpoint_dir", "path", "special_tokens_path", "merges_file", "merges_path", "vocab_path", "adapter_checkpoint")
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_READERS = ("json", "csv", "parquet", "text")  # a `source` that reads local `data_files`


def check_components(loaded: LoadedConfig, *, files: bool = True) -> list[str]:
    """Return what is wrong with the components: names, arguments, types and, if `files`, inputs that do not exist.

    Imports what is named, but never a Python file below the current directory: that is read, not run.
    """
    problems = []
    for path, node in components(loaded.resolved):
        for key, text in _component_problems(loaded, path, node, files):
            where = (*path, key)
            problems.append(redact(f"{loaded.tree.where(where)}: {dotted(where)}: {text}"))
    return problems


def _component_problems(loaded: LoadedConfig, path: Path, node: Component, files: bool) -> Iterator[tuple[str, str]]:
    name = node[KEY]
    if not isinstance(name, str) or refusal(name):
        return  # reported with the keys and types
    try:
        parameters = _parameters(name)
    except TuneError as error:
        yield KEY, error.message
        return
    top = len(path) == 1 or (len(path) == 2 and path[1].isdecimal())
    supplied = loaded.schema.supplied.get(path[0]) if top else Supplied(0, frozenset(), more=False)
    if parameters is not None:
        yield from _argument_problems(name, node, parameters, supplied)
    if files and name.startswith("mytune."):
        yield from _missing_files(node)


def _parameters(name: str) -> list[Parameter] | None:
    """Return the parameters of the function or class called `name`; None where they cannot be known."""
    if local := local_file(name):
        return _read_parameters(*local, name)
    target = find_component(name)
    try:
        return list(inspect.signature(target).parameters.values())
    except ValueError:
        return None


def _argument_problems(
    name: str, node: Component, parameters: list[Parameter], supplied: Supplied | None
) -> Iterator[tuple[str, str]]:
    short = name.rpartition(".")[2]
    by_name = {p.name: p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    positional = [p.name for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    by_recipe = positional[: supplied.positional] if supplied else []
    for key, value in node.items():
        if key == KEY:
            continue
        if key in by_recipe:
            yield key, f"the recipe itself gives {short} this argument: remove it"
        elif key in by_name:
            if not _fits_parameter(value, by_name[key]):
                yield key, f"{value!r} is not {_annotation(by_name[key])}"
        elif not takes_any:
            yield key, f"{short} takes no argument {key!r}{did_you_mean(key, by_name.keys() - set(by_recipe))}"
    if supplied is None or supplied.more:
        return
    if not takes_any:
        for key in sorted(supplied.keywords - by_name.keys()):
            yield KEY, f"{short} does not take {key!r}, which the recipe gives it: choose another component"
    given = {*node, *by_recipe, *supplied.keywords}
    for parameter in by_name.values():
        if parameter.default is Parameter.empty and parameter.name not in given:
            yield KEY, f"{short} needs the argument {parameter.name!r}"


def _annotation(parameter: Parameter) -> str:
    note = parameter.annotation
    return note if isinstance(note, str) else inspect.formatannotation(note)


def _fits_parameter(value: Any, parameter: Parameter) -> bool:
    if value is None and parameter.default is None:
        return True
    if parameter.annotation is Parameter.empty or (isinstance(value, dict) and KEY in value):
        return True
    try:
        return _fits(value, parse_hint(_annotation(parameter)))
    except (ValueError, SyntaxError):
        return True  # a type that a config has no word for


def _fits(value: Any, hint: Any) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in options)
    if origin is typing.Literal:
        return value in options
    if origin is list:
        return isinstance(value, list) and all(_fits(each, options[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _missing_files(node: Component) -> Iterator[tuple[str, str]]:
    bases = ["", *(node[key] for key in ("checkpoint_dir", "output_dir") if isinstance(node.get(key), str))]
    for key in _INPUTS:
        value = node.get(key)
        if isinstance(value, str) and not any(File(base, value).exists() for base in bases):
            yield key, f"{value!r} does not exist; models come with `tune download REPO --output-dir DIR`"
    for key in ("source", "data_files"):
        values = node.get(key)
        if key == "data_files" and node.get("source") not in _READERS:
            continue
        for value in values if isinstance(values, list) else [values]:
            local = isinstance(value, str) and value.endswith(_DATA_SUFFIXES) and "://" not in value
            if local and not glob(value, recursive=True):
                yield key, f"{value!r} does not exist"


def _read_parameters(file: File, module: str, name: str) -> list[Parameter] | None:
    """Read the parameters of a function or class from a file's source; None where only running it would tell."""
    wanted = name.removeprefix(f"{module}.")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not a Python file: {error}") from None
    defined = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    found = defined.get(wanted)
    if found is None:
        bound = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
        bound |= {each.asname or each.name for each in ast.walk(tree) if isinstance(each, ast.alias)}
        if wanted.split(".")[0] in {*bound, *defined} or "*" in bound:
            return None
        known = [f"{module}.{each}" for each in defined]
        raise ConfigError(f"unknown component {name!r}{did_you_mean(name, known)}")
    if isinstance(found, ast.FunctionDef):
        return None if found.decorator_list else _to_parameters(found.args)
    init = [each for each in found.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    return _to_parameters(init[0].args)[1:] if init else None


def _to_parameters(args: ast.arguments) -> list[Parameter]:
    def make(arg: ast.arg, kind: Any, default: ast.expr | None) -> Parameter:
        value = None if isinstance(default, ast.Constant) and default.value is None else default
        note = ast.unparse(arg.annotation) if arg.annotation else Parameter.empty
        return Parameter(arg.arg, kind, default=value if default else Parameter.empty, annotation=note)

    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    found = [make(a, Parameter.POSITIONAL_OR_KEYWORD, d) for a, d in zip(plain, defaults, strict=True)]
    found += [make(a, Parameter.KEYWORD_ONLY, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return found + ([make(args.kwarg, Parameter.VAR_KEYWORD, None)] if args.kwarg else [])
