"""Values that fit the schema's types, and references filled in: OmegaConf's part of the work."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import TYPE_CHECKING, Any

from mytune.config.schema import Field
from mytune.config.tree import Tree, lookup
from mytune.config.types import Keys, children
from mytune.errors import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

MAX_TEXT = 1_000_000  # characters that references may expand to

_OPEN = r"(?<!\\)(?:\\\\)*\$\{"
_REFERENCE = re.compile(_OPEN + r"([A-Za-z_][\w.-]*)\}")
_BAD_REFERENCE = re.compile(_OPEN + r"(?!oc\.env:|asset:\w+\}|[A-Za-z_][\w.-]*\})")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list[str]": "a list of texts",
    "Component": "a component, a mapping with _component_",
    "Components": "a component, a mapping with _component_, or a list of them",
}


def make_typed(tree: Tree) -> DictConfig:
    """Return a structured config with the values that fit the schema; the others are problems."""
    from omegaconf import MISSING, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    fields = [(f.name, f.hint, dataclasses.field(default=MISSING)) for f in tree.schema.fields]
    config: DictConfig = OmegaConf.structured(dataclasses.make_dataclass("Config", fields))
    for field in tree.schema.fields:
        if tree.sound(field.name):
            value = tree.values[field.name]
            if field.kind == "bool" and type(value) is int and value not in (0, 1):
                tree.problem((field.name,), f"{value} is not {_expected(field, value)}")
                continue
            try:
                OmegaConf.update(config, field.name, value, merge=False)
            except OmegaConfBaseException:
                tree.problem((field.name,), f"{show(value)} is not {_expected(field, value)}")
    return config


def show(value: Any) -> str:
    return "null" if value is None else repr(value)


def in_words(kind: str) -> str:
    """Return what a type is called to people."""
    return _WORDS.get(kind, kind)


def _expected(field: Field, value: Any) -> str:
    null = " or null" if field.optional else ""
    if field.kind.startswith("Literal["):
        choices = field.kind[len("Literal[") : -1]
        near = did_you_mean(str(value), re.findall(r"'([^']*)'", choices))
        return f"one of {choices}{null}{near}"
    left = "; leave the key out for its default" if value is None and not field.required else ""
    return in_words(field.kind) + null + as_list(field.kind, value) + left


def as_list(kind: str, value: Any) -> str:
    """Return how a single value is written where a list is wanted, or nothing."""
    if not re.match(r"list\[\w+\]", kind) or not isinstance(value, str | int | float):
        return ""
    is_plain = re.fullmatch(r"[\w./,-]+", str(value))  # what else YAML would read otherwise
    return f"; write [{value}]" if is_plain else f'; write ["{value}"]'


def bad_reference(text: str) -> str | None:
    """Return what is wrong with a `${...}` in `text`: OmegaConf's other resolvers stay out."""
    if not _BAD_REFERENCE.search(text):
        return None
    allowed = "only ${key}, ${oc.env:NAME} and ${asset:NAME} are filled in"
    return f"{text!r}: {allowed}; for the text itself write \\${{"


def resolve(tree: Tree, typed: DictConfig) -> dict[str, Any]:
    """Return plain values with references filled in; where one cannot be is a problem, and None."""
    from omegaconf import OmegaConf

    from mytune.assets import ASSETS

    OmegaConf.register_resolver("asset", lambda name: str(ASSETS / name), replace=True)
    for name in filter(tree.sound, tree.schema.names):
        try:
            _spend(tree.values, tree.values[name], [MAX_TEXT])
        except (OverflowError, RecursionError):
            tree.problem((name,), "its ${...} go round in a circle or expand without end")
    names = filter(tree.sound, tree.schema.names)
    return {name: _resolve(tree, typed, name, (name,)) for name in names}


def _spend(values: dict[str, Any], node: Any, budget: list[int]) -> None:
    """Count what `node` stands for with its references filled in; OverflowError beyond `budget`."""
    budget[0] -= 1 + (len(node) if isinstance(node, str) else 0)
    if budget[0] < 0:
        raise OverflowError
    for _, child in children(node):
        _spend(values, child, budget)
    for key in _REFERENCE.findall(node) if isinstance(node, str) else ():
        with contextlib.suppress(LookupError):  # reported where it is filled in
            _spend(values, lookup(values, tuple(key.split("."))), budget)


def _resolve(tree: Tree, container: Any, key: Any, path: Keys) -> Any:
    from omegaconf import DictConfig, ListConfig
    from omegaconf.errors import (
        InterpolationKeyError,
        InterpolationToMissingValueError,
        MissingMandatoryValue,
        OmegaConfBaseException,
    )

    if path in tree.broken:
        return None
    try:
        value = container[key]
    except MissingMandatoryValue:
        tree.problem(path, "??? stands for a value that is still to be given")
        return None
    except InterpolationToMissingValueError:  # reported where the value is missing
        tree.broken.add(path)
        return None
    except OmegaConfBaseException as error:
        text = lookup(tree.values, path)
        line = str(error).splitlines()[0].rpartition("interpolation: ")[2].strip('"')
        unknown = _REFERENCE.findall(str(text)) if isinstance(error, InterpolationKeyError) else []
        near = did_you_mean(unknown[0], tree.schema.names) if unknown else ""
        tree.problem(path, f"{text!r}: {line}{near}")
        return None
    if isinstance(value, DictConfig):
        return {each: _resolve(tree, value, each, (*path, str(each))) for each in value}
    if isinstance(value, ListConfig):
        return [_resolve(tree, value, i, (*path, str(i))) for i in range(len(value))]
    return value
