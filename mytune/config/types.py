"""What recipes and configs mean by a component: a mapping whose `_component_` names what to build."""

from __future__ import annotations

from typing import Any, TypeAlias

KEY = "_component_"

Component: TypeAlias = dict[str, Any]
Components: TypeAlias = dict[str, Any] | list[dict[str, Any]]
Path: TypeAlias = tuple[str, ...]  # a dotted key, split


class _Default(dict[str, Any]):
    """A mapping that a dataclass takes as a default: those have to be hashable."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def component(path: str, **arguments: Any) -> Component:
    """Return the component `path` with its arguments, as a default in a recipe's `Config`."""
    return _Default({KEY: path, **arguments})


def dotted(path: Path) -> str:
    return ".".join(path)
