"""Components as plain values: mappings whose `_component_` names what to build."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

KEY = "_component_"

Component: TypeAlias = dict[str, Any]
Components: TypeAlias = dict[str, Any] | list[dict[str, Any]]
Keys: TypeAlias = tuple[str, ...]  # a dotted key, split


class _Default(dict[str, Any]):
    """A mapping that a dataclass takes as a default: those have to be hashable."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def component(path: str, /, **arguments: Any) -> Component:
    """Return the component `path` with its arguments, as a default in a recipe's `Config`."""
    return _Default({KEY: path, **arguments})


def dotted(path: Keys) -> str:
    return ".".join(path)


def children(node: Any) -> list[tuple[str, Any]]:
    """Return the keys (indices as text) and values of a mapping or list; nothing for a scalar."""
    if isinstance(node, dict):
        return list(node.items())
    return [(str(i), item) for i, item in enumerate(node)] if isinstance(node, list) else []


def components(node: Any, path: Keys = ()) -> Iterator[tuple[Keys, Component]]:
    """Yield every component in plain values, outer ones first, with its key."""
    if isinstance(node, dict) and KEY in node:
        yield path, node
    for key, child in children(node):
        yield from components(child, (*path, key))
