"""A config being put together, and the overrides that change it: `key=value`, `~key`, `component=dotted.path`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mytune.config.schema import Field, Schema
from mytune.config.torchtune import our_name
from mytune.config.types import KEY, Path, dotted
from mytune.config.yaml_text import read_value
from mytune.errors import did_you_mean

_KEY_TEXT = re.compile(r"[A-Za-z_]\w*(?:\.[\w-]+)*")


@dataclass
class Tree:
    """Values with the place that set each, what is wrong with them, and what to tell the user."""

    schema: Schema
    values: dict[str, Any]
    places: dict[Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def where(self, path: Path) -> str:
        """Return the place of the nearest enclosing key that somebody set."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return f"default of recipe {self.schema.file.name}"

    def place(self, path: Path, where: str) -> None:
        self.places = {p: w for p, w in self.places.items() if p[: len(path)] != path}
        self.places[path] = where

    def problem(self, path: Path, text: str) -> None:
        self.problems.append(f"{self.where(path)}: {dotted(path)}: {text}")


@dataclass(frozen=True)
class Override:
    """One override, `text` as the user typed it."""

    text: str
    path: Path
    value: Any = None
    remove: bool = False

    @property
    def where(self) -> str:
        return f"override '{self.text}'"


def merge(base: Any, new: Any) -> Any:
    """Lay `new` over `base`. A component that is named anew keeps nothing of the one it replaces."""
    if not isinstance(base, dict) or not isinstance(new, dict) or KEY in new:
        return new
    return base | {key: merge(base.get(key), value) for key, value in new.items()}


def apply_overrides(tree: Tree, texts: Sequence[str]) -> None:
    """Apply removals, then component swaps (outer before inner), then values, each in the order given."""
    parsed = []
    for text in texts:
        try:
            parsed.append(_parse(text, tree.schema))
        except ValueError as error:
            tree.problems.append(f"override '{text}': {error}")
    swaps = [each for each in parsed if not each.remove and _is_swap(tree, each)]
    steps = [(_remove, each) for each in parsed if each.remove]
    steps += [(_swap, each) for each in sorted(swaps, key=lambda each: len(each.path))]
    steps += [(_set, each) for each in parsed if not each.remove and each not in swaps]
    for step, override in steps:
        try:
            step(tree, override, parsed)
        except ValueError as error:
            tree.problems.append(f"{override.where}: {error}")


def _parse(text: str, schema: Schema) -> Override:
    key, equals, raw = text.partition("=")
    name = key.removeprefix("~")
    if not _KEY_TEXT.fullmatch(name):
        bare = key.lstrip("-+~").replace("-", "_")
        raise ValueError("write key=value or ~key" + did_you_mean(bare, schema.names))
    path = tuple(name.split("."))
    if key.startswith("~"):
        if equals:
            raise ValueError(f"~{name} removes a key and takes no value; to set it write {name}={raw}")
        return Override(text, path, remove=True)
    if not raw:
        raise ValueError(f"no value; write {name}=null for none, {name}='\"\"' for an empty text")
    return Override(text, path, _value(raw, schema.names.get(name)))


def _value(raw: str, field: Field | None) -> Any:
    """Read a value; where a text is wanted, `00005`, `a: b` and `[x` are taken as they stand."""
    wants_text = field is not None and field.kind == "str"
    try:
        value = read_value(raw)
    except ValueError:
        if wants_text:
            return raw
        raise
    return raw if wants_text and not isinstance(value, str | None) else value


def _lookup(values: Any, path: Path) -> Any:
    """Return what stands at `path`; LookupError if nothing does."""
    for part in path:
        values = values[_slot(values, part)] if isinstance(values, dict | list) else {}[part]
    return values


def _slot(container: dict[str, Any] | list[Any], part: str) -> Any:
    if isinstance(container, dict):
        return part
    if not part.isdecimal() or int(part) >= len(container):
        raise ValueError(f"{part!r} is not one of the list's indices, 0 to {len(container) - 1}")
    return int(part)


def _put(values: Any, path: Path, value: Any) -> None:
    for part in path[:-1]:
        slot = _slot(values, part)
        inner = values[slot] if isinstance(values, list) else values.get(slot)
        if not isinstance(inner, dict | list):
            inner = values[slot] = {}
        values = inner
    values[_slot(values, path[-1])] = value


def _is_swap(tree: Tree, override: Override) -> bool:
    if not isinstance(override.value, str):
        return False
    try:
        old = _lookup(tree.values, override.path)
    except (LookupError, ValueError):
        old = None
    named = tree.schema.names.get(dotted(override.path))
    return (isinstance(old, dict) and KEY in old) or (named is not None and named.is_component)


def _swap(tree: Tree, override: Override, parsed: list[Override]) -> None:
    path, name = override.path, dotted(override.path)
    try:
        old = _lookup(tree.values, path)
    except LookupError:
        old = None
    if isinstance(old, dict) and our_name(str(old.get(KEY))) == our_name(override.value):
        return
    given = {each.path[len(path)] for each in parsed if each.path[:-1] == path and not each.remove}
    dropped = sorted(old.keys() - given - {KEY}) if isinstance(old, dict) else []
    _put(tree.values, path, {KEY: override.value})
    tree.place(path, override.where)
    if dropped:
        keep = f"{name}.{KEY}={override.value}"
        tree.notices.append(
            f"{override.where}: dropped the old arguments {', '.join(dropped)}; {keep} keeps them"
        )


def _set(tree: Tree, override: Override, _: list[Override]) -> None:
    try:
        old = _lookup(tree.values, override.path)
    except LookupError:
        old = None
    _put(tree.values, override.path, merge(old, override.value))
    tree.place(override.path, override.where)


def _remove(tree: Tree, override: Override, _: list[Override]) -> None:
    path, name = override.path, dotted(override.path)
    field = tree.schema.names.get(name)
    if field is None:
        _delete(tree, path)
    elif field.optional:
        tree.values[name] = None
    elif field.required:
        raise ValueError(f"{name} is required and cannot be removed; to change it write {name}=...")
    else:
        tree.values[name] = field.default
    tree.place(path, override.where)


def _delete(tree: Tree, path: Path) -> None:
    if path[-1] == KEY:
        raise ValueError(f"a component needs its {KEY}; to remove it write ~{dotted(path[:-1])}")
    try:
        parent = _lookup(tree.values, path[:-1])
        del parent[_slot(parent, path[-1])]
    except (LookupError, TypeError):
        known = [dotted((*path[:-1], str(key))) for key in parent] if isinstance(parent, dict) else []
        raise ValueError("there is no such key" + did_you_mean(dotted(path), known)) from None
