"""Overrides from the command line: `key=value`, `~key`, `component=dotted.path`, and how they change a config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mytune.config.schema import Schema
from mytune.config.types import KEY, Path, dotted
from mytune.config.yaml_text import read_value
from mytune.errors import did_you_mean

_KEY_PATTERN = re.compile(r"[A-Za-z_]\w*(?:\.[\w-]+)*")


@dataclass(frozen=True)
class Override:
    """One override. `text` is what the user typed, `raw` what follows the `=`."""

    text: str
    path: Path
    raw: str = ""
    value: Any = None
    remove: bool = False

    @property
    def where(self) -> str:
        return f"override '{self.text}'"


@dataclass
class Tree:
    """A config being put together: its values, where each was set, what is wrong, what to tell the user."""

    schema: Schema
    values: dict[str, Any]
    places: dict[Path, str]
    problems: list[str]
    notices: list[str]

    def where(self, path: Path) -> str:
        """Return the place of the nearest enclosing key that somebody set."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return f"default of recipe {self.schema.file.name}"

    def place(self, path: Path, where: str) -> None:
        self.places = {p: w for p, w in self.places.items() if p[: len(path)] != path}
        self.places[path] = where


def merge(base: Any, new: Any) -> Any:
    """Lay `new` over `base`. A component that is named anew keeps nothing of the one it replaces."""
    if not isinstance(base, dict) or not isinstance(new, dict) or KEY in new:
        return new
    return base | {key: merge(base.get(key), value) for key, value in new.items()}


def apply_overrides(tree: Tree, texts: Sequence[str]) -> None:
    """Apply removals, then component swaps, then values, each in the order given."""
    parsed = [each for text in texts if (each := _parse(text, tree))]
    swaps = [each for each in parsed if not each.remove and _is_swap(tree, each)]
    for each in parsed:
        if each.remove:
            _remove(tree, each)
    for each in sorted(swaps, key=lambda each: len(each.path)):
        _swap(tree, each)
    for each in parsed:
        if not each.remove and each not in swaps:
            _set(tree, each)


def _parse(text: str, tree: Tree) -> Override | None:
    key, equals, raw = text.partition("=")
    remove = key.startswith("~")
    name = key[1:] if remove else key
    if not _KEY_PATTERN.fullmatch(name):
        bare = key.lstrip("-+").replace("-", "_")
        hint = f"; did you mean '{bare}={raw}'?" if _KEY_PATTERN.fullmatch(bare) else ""
        tree.problems.append(f"override '{text}': an override is key=value or ~key{hint}")
        return None
    path = tuple(name.split("."))
    if path[0] not in tree.schema.names:
        return Override(text, path, raw, raw, remove)
    if remove:
        if equals:
            tree.problems.append(f"override '{text}': ~{name} takes no value")
        return Override(text, path, remove=True)
    if not equals or not raw:
        what = f"write {name}=null for none, {name}='\"\"' for an empty text"
        tree.problems.append(f"override '{text}': the value is missing; {what}")
        return None
    try:
        value = read_value(raw)
    except ValueError as error:
        value = raw
        if tree.schema.names[name].kind != "str" if name in tree.schema.names else True:
            tree.problems.append(f"override '{text}': {error}")
            return None
    ...
