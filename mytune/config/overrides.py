"""Overrides from the command line: `key=value`, `~key`, `component=dotted.path`, at any depth."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mytune.config.schema import Field, Schema
from mytune.config.torchtune import our_name
from mytune.config.tree import Tree, lookup, merge, put, slot
from mytune.config.types import KEY, Keys, dotted
from mytune.config.yaml_text import read_value
from mytune.errors import did_you_mean

_KEY_TEXT = re.compile(r"[A-Za-z_]\w*(?:\.[\w-]+)*")


@dataclass(frozen=True)
class Override:
    """One override, `text` as the user typed it."""

    text: str
    path: Keys
    value: Any = None
    remove: bool = False

    @property
    def where(self) -> str:
        return f"override '{self.text}'"


def apply_overrides(tree: Tree, texts: Sequence[str]) -> None:
    """Apply removals, then component swaps (outer ones first), then values, in the order given."""
    parsed = []
    for words in _torn(texts, tree.schema):
        text = " ".join(words)
        try:
            if len(words) > 1:
                raise ValueError(f"write {_mended(text)}")
            parsed.append(_parse(text, tree.schema))
        except ValueError as error:
            tree.problems.append(f"override '{text}': {error}")
    removals = [each for each in parsed if each.remove]
    swaps = [each for each in parsed if _is_swap(tree, each)]
    values = [each for each in parsed if each not in removals and each not in swaps]
    swaps.sort(key=lambda each: len(each.path))
    for override in [*removals, *swaps, *values]:
        around = [override.path[:end] for end in range(1, len(override.path))]
        # What is no mapping becomes one: the override has set that.
        outermost = next((p for p in around if not isinstance(_old(tree, p), dict | list)), None)
        try:
            if override.remove:
                _remove(tree, override)
            elif override in swaps:
                _swap(tree, override, parsed)
            else:
                put(tree.values, override.path, merge(_old(tree, override.path), override.value))
            tree.place(outermost or override.path, override.where)
        except (ValueError, IndexError) as error:
            tree.problems.append(f"{override.where}: {error}")


def _torn(texts: Sequence[str], schema: Schema) -> list[list[str]]:
    """Return each override with the words after it, which a shell has torn off at spaces."""
    found: list[list[str]] = []
    for text in texts:
        key, equals, _ = text.partition("=")
        name = key.removeprefix("~")
        begins = key != name or name.partition(".")[0] in schema.names
        begins |= bool(equals and _KEY_TEXT.fullmatch(name))
        if begins or text[:1] in "+-" or not found or not _goes_on(found[-1], text):
            found.append([])
        found[-1].append(text)
    return found


def _goes_on(words: list[str], text: str) -> bool:
    """May a word belong to an override? That has a value, or a lone `=` follows its key."""
    return "=" in "".join(words) or text.startswith("=")


def _mended(text: str) -> str:
    """Return an override with no spaces around its `=`, and quoted if there are others."""
    quoted = shlex.quote(whole := re.sub(r"\s*=\s*", "=", text, count=1))
    return f"{whole}, without spaces around =" if quoted == whole else f"it in quotes: {quoted}"


def _parse(text: str, schema: Schema) -> Override:
    key, equals, raw = text.partition("=")
    name = key.removeprefix("~")
    if not _KEY_TEXT.fullmatch(name):
        near = did_you_mean(key.lstrip("-+~"), schema.names)
        spaces = "" if equals else ", without spaces"
        raise ValueError(f"write key=value or ~key{spaces}{near}")
    path = tuple(name.split("."))
    if key.startswith("~"):
        if equals:
            raise ValueError(
                f"~{name} removes a key and takes no value; to set it write {name}={raw}"
            )
        return Override(text, path, remove=True)
    if not equals:
        raise ValueError(f"write {name}=VALUE, without spaces; or in quotes: '{name}=two words'")
    field = schema.names.get(name)
    if not raw:
        null = [f"{name}=null for none"] if field is None or field.optional else []
        texts = field is None or "str" in field.type
        ways = null + ([f"{name}='\"\"' for an empty text"] if texts else [])
        raise ValueError("no value" + (f"; write {', '.join(ways)}" if ways else ""))
    return Override(text, path, _read(raw, field))


def _read(raw: str, field: Field | None) -> Any:
    """Read a value; where a text is wanted `00005`, `a: b` and `[x` are taken as they stand."""
    wants_text = field is not None and field.kind == "str"
    try:
        value = read_value(raw)
    except ValueError:
        if wants_text:
            return raw
        if raw[0] in "[{" and raw[-1] not in "]}":
            raise ValueError(f"{raw} does not end: leave out its spaces, or quote it all") from None
        raise
    return raw if wants_text and not isinstance(value, str | None) else value


def _old(tree: Tree, path: Keys) -> Any:
    try:
        return lookup(tree.values, path)
    except LookupError:
        return None


def _is_swap(tree: Tree, override: Override) -> bool:
    if not isinstance(override.value, str):
        return False
    old, field = _old(tree, override.path), tree.schema.names.get(dotted(override.path))
    return (isinstance(old, dict) and KEY in old) or (field is not None and field.is_component)


def _swap(tree: Tree, override: Override, parsed: list[Override]) -> None:
    """Name another component; the arguments of the old one go, unless it is the same."""
    path, old = override.path, _old(tree, override.path)
    if not isinstance(old, dict):
        old = {}
    if our_name(str(old.get(KEY))) == our_name(override.value):
        return
    put(tree.values, path, {KEY: override.value})
    inside = [each.path for each in parsed if each.path[: len(path)] == path != each.path]
    if dropped := old.keys() - {KEY} - {each[len(path)] for each in inside}:
        keep = f"{dotted(path)}.{KEY}={override.value}"
        what = f"dropped {', '.join(sorted(dropped))} of the component before"
        tree.notices.append(f"{override.where}: {what}; to keep its arguments write {keep}")


def _remove(tree: Tree, override: Override) -> None:
    """Remove an argument or an unknown key; make an optional key null, another its default."""
    path, name = override.path, dotted(override.path)
    field = tree.schema.names.get(name)
    if field is None:
        _delete(tree, path)
    elif field.optional:
        tree.values[name] = None
    elif field.required:
        raise ValueError(f"{name} is required; to change it write {name}=...")
    else:
        tree.values[name] = copy.deepcopy(field.default)


def _delete(tree: Tree, path: Keys) -> None:
    if path[-1] == KEY:
        raise ValueError(
            f"a component needs its {KEY}; to remove it all write ~{dotted(path[:-1])}"
        )
    parent = _old(tree, path[:-1])
    if isinstance(parent, dict) and path[-1] not in parent:
        raise ValueError("there is no such key" + did_you_mean(path[-1], parent))
    if not isinstance(parent, dict | list):
        raise ValueError(f"{dotted(path[:-1])} has no keys")
    del parent[slot(parent, path[-1])]
