"""What a component takes: its parameters, and whether a value of a config fits one."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
import typing
from collections import abc
from inspect import Parameter
from pathlib import Path
from typing import Any

from mytune.config.components import check_not_hidden, find_component, local_file
from mytune.config.schema import parse_file, parse_hint
from mytune.config.types import KEY
from mytune.errors import ConfigError, did_you_mean


def read_parameters(name: str) -> list[Parameter] | None:
    """Return the parameters of the component `name`; None where only running it would tell.

    Imports it, unless it is in a Python file below the current directory: that is read, not run.
    Raises what `find_component` raises.
    """
    if local := local_file(name):
        check_not_hidden(*local)
        return _from_source(*local, name)
    component = find_component(name)
    try:
        parameters = list(inspect.signature(component).parameters.values())
    except ValueError:
        return None
    ours = name.startswith("mytune.")
    return [_resolved(each, component) if ours else _guessed(each) for each in parameters]


def _guessed(parameter: Parameter) -> Parameter:
    """Let what is a number by default be one; torchao's and bitsandbytes' have no annotation."""
    is_number = parameter.annotation is Parameter.empty and type(parameter.default) is float
    return parameter.replace(annotation=float) if is_number else parameter


def _resolved(parameter: Parameter, component: Any) -> Parameter:
    """Put what its module's names mean in the place of an annotation's text."""
    names = {**vars(typing), **vars(abc), **vars(sys.modules[component.__module__])}
    try:
        return parameter.replace(annotation=eval(parameter.annotation, names))
    except (NameError, TypeError):  # imported for the type checker alone; none, or no text
        return parameter


def annotation(parameter: Parameter) -> str:
    """Return what a parameter takes, for people."""
    note = parameter.annotation
    text = note if isinstance(note, str) else inspect.formatannotation(note)
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", text)  # of what module a name is
    text = re.sub(r"\b(Sequence|tuple)\[", "list[", text).replace("Mapping[", "dict[")
    text = re.sub(r" \| (Path|Tensor)\b", "", text)
    text = re.sub(r"Literal\[(.*?)\]", r"one of \1", text)
    return re.sub(r"Callable\[.*\](?= \||$)", f"a component ({KEY}: ...)", text)


def fits(value: Any, parameter: Parameter) -> bool:
    """May `value` be given to `parameter`? Yes, if its annotation is none that configs know."""
    note = parameter.annotation
    if note is Parameter.empty or value is parameter.default is None:
        return True
    try:
        return _fits(value, parse_hint(note) if isinstance(note, str) else note)
    except (ValueError, SyntaxError):
        return True


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, dict) and KEY in value:
        return True  # what a component gives
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in options)
    if origin is typing.Literal:
        return value in options
    if origin is tuple and ... not in options:
        same = isinstance(value, list) and len(value) == len(options)
        return same and all(map(_fits, value, options))
    inner = options[-1 if origin in (dict, abc.Mapping) else 0] if options else Any
    if origin in (list, tuple, abc.Sequence):
        return isinstance(value, list) and all(_fits(each, inner) for each in value)
    if origin in (dict, abc.Mapping):
        return isinstance(value, dict) and all(_fits(each, inner) for each in value.values())
    if origin is abc.Callable:
        return False  # a component makes one
    if hint in (int, float) and type(value) is int:
        return abs(value) < 2**63  # what torch can count to
    if hint is float:
        return type(value) is float
    if hint in (str, int, bool, list, dict, type(None)):
        return type(value) is hint
    if getattr(hint, "__name__", "") == "Tensor":
        return False  # no value of a config is one
    return isinstance(value, str) if hint is Path else True


def _from_source(file: Path, module: str, name: str) -> list[Parameter] | None:
    wanted = name.removeprefix(f"{module}.")
    _, tree = parse_file(file)
    found = [each for each in tree.body if getattr(each, "name", None) == wanted]
    match found[-1:]:
        case [ast.FunctionDef(args=arguments, decorator_list=[])]:
            return _parameters(arguments)
        case [ast.ClassDef(body=body)]:
            inits = [each for each in body if getattr(each, "name", None) == "__init__"]
            init = inits[-1] if inits else None
            return _parameters(init.args)[1:] if isinstance(init, ast.FunctionDef) else None
    words = {word for each in ast.walk(tree) for word in _names(each)}
    if found or wanted.split(".")[0] in words or "*" in words:
        return None
    raise ConfigError(f"unknown component {name!r}{did_you_mean(wanted, words)}")


def _names(node: ast.AST) -> list[str]:
    """Return the names that a node may bind: definitions, assignments, imports."""
    found = [getattr(node, each, None) for each in ("name", "id", "asname")]
    return [each for each in found if isinstance(each, str)]


def _parameters(arguments: ast.arguments) -> list[Parameter]:
    def make(arg: ast.arg, kind: Any, default: ast.expr | None) -> Parameter:
        none = isinstance(default, ast.Constant) and default.value is None
        value = Parameter.empty if default is None else None if none else default
        note = ast.unparse(arg.annotation) if arg.annotation else Parameter.empty
        return Parameter(arg.arg, kind, default=value, annotation=note)

    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    found = [
        make(arg, Parameter.POSITIONAL_OR_KEYWORD, d)
        for arg, d in zip(plain, defaults, strict=True)
    ]
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(make(arg, Parameter.KEYWORD_ONLY, default))
    return found + ([make(arguments.kwarg, Parameter.VAR_KEYWORD, None)] if arguments.kwarg else [])
