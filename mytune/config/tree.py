"""A config while it is put together: values, what set each, what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mytune.config.schema import Schema
from mytune.config.types import KEY, Keys, dotted


@dataclass
class Tree:
    """Plain values with their places; `broken` holds the keys that a problem was found with."""

    schema: Schema
    values: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    broken: set[Keys] = field(default_factory=set)

    def where(self, path: Keys) -> str:
        """Return the place that set `path`, a key around it, or else a key in it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        inside = (where for key, where in self.places.items() if key[: len(path)] == path)
        return next(inside, f"default of recipe {self.schema.file.name}")

    def place(self, path: Keys, where: str) -> None:
        """Note that `where` set all that is at `path`."""
        self.places = {p: w for p, w in self.places.items() if p[: len(path)] != path}
        self.places[path] = where

    def problem(self, path: Keys, text: str) -> None:
        self.broken.add(path)
        self.problems.append(f"{self.where(path)}: {dotted(path)}: {text}")

    def sound(self, name: str) -> bool:
        """Is there a value for this top-level key, of a kind that can be used?"""
        return name in self.values and (name,) not in self.broken


def merge(base: Any, new: Any) -> Any:
    """Lay `new` over `base`; a component that is named keeps nothing of the one it replaces."""
    if not isinstance(base, dict) or not isinstance(new, dict) or KEY in new:
        return new
    return base | {key: merge(base.get(key), value) for key, value in new.items()}


def lookup(values: Any, path: Keys) -> Any:
    """Return what stands at `path`; LookupError if nothing does."""
    for part in path:
        if not isinstance(values, dict | list):
            raise LookupError(part)
        values = values[slot(values, part)]
    return values


def put(values: Any, path: Keys, value: Any) -> None:
    """Set what stands at `path`, making mappings on the way; IndexError if a list is shorter."""
    for part in path[:-1]:
        here = slot(values, part)
        inner = values[here] if isinstance(values, list) else values.get(here)
        if not isinstance(inner, dict | list):
            inner = values[here] = {}
        values = inner
    values[slot(values, path[-1])] = value


def slot(container: dict[str, Any] | list[Any], part: str) -> Any:
    """Return the key or index that `part` means in `container`."""
    if isinstance(container, dict):
        return part
    if not part.isdecimal() or int(part) >= len(container):
        raise IndexError(f"{part!r} is no index of a list of {len(container)}")
    return int(part)
