"""The schema of a recipe: its `Config` dataclass, read from the source; nothing is run."""

from __future__ import annotations

import ast
import io
import tokenize
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mytune.config.types import KEY
from mytune.errors import ConfigError

_HINTS: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "Any": Any,
    "Component": dict[str, Any],
    "Components": Any,  # OmegaConf has no union of containers; `load` looks at the shape
}
_ALLOWED = f"{', '.join(_HINTS)}, Literal[...], list[...], dict[str, ...], X | None"
_NOT_LITERAL = (
    "a default is a literal, component(...) or field(default_factory=lambda: ...), "
    "because a recipe is read without running it"
)


@dataclass(frozen=True)
class Field:
    """One key: `type` as written, `hint` as a type, its comment, the section it is in."""

    name: str
    type: str
    hint: Any
    default: Any
    required: bool
    comment: str
    section: str

    @property
    def optional(self) -> bool:
        """May the value be null?"""
        return self.type == "Any" or "None" in self.type.split(" | ")

    @property
    def kind(self) -> str:
        """The type without `| None`."""
        return " | ".join(part for part in self.type.split(" | ") if part != "None")

    @property
    def is_component(self) -> bool:
        return self.kind in ("Component", "Components")


@dataclass(frozen=True)
class Schema:
    """A recipe's keys, and what it hands to their components besides a config's arguments.

    `supplied` is the recipe's table SUPPLIED: key -> names of arguments, the first of which goes by
    position, the others by name; None if it has no such table.
    """

    file: Path
    fields: list[Field]
    supplied: dict[str, list[str]] | None = None

    @property
    def names(self) -> dict[str, Field]:
        return {each.name: each for each in self.fields}


def read_schema(recipe_file: Path) -> Schema:
    """Read a recipe's `Config`. Raises `ConfigError` naming every field that is not declarative."""
    source, tree = parse_file(recipe_file)
    found = [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == "Config"]
    if not found:
        raise ConfigError(f"{recipe_file} has no `class Config`: a recipe declares its keys there")
    fields = _read_fields(found[0], source, recipe_file)
    return Schema(recipe_file, fields, _read_supplied(tree))


def parse_file(file: Path) -> tuple[str, ast.Module]:
    """Return a Python file's text and syntax. Raises `ConfigError` that names the wrong line."""
    try:
        source = file.read_text(encoding="utf-8")
        return source, ast.parse(source)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line, why = getattr(error, "lineno", None) or 1, getattr(error, "msg", error)
        raise ConfigError(f"{file}:{line}: not a Python file: {why}") from None


def parse_hint(annotation: str) -> Any:
    """Return the type that an annotation's text means; ValueError if configs have no such type."""
    return _hint(ast.parse(annotation, mode="eval").body)


def _read_fields(config: ast.ClassDef, source: str, file: Path) -> list[Field]:
    comments = _comments(source)
    fields, problems, end = [], [], config.lineno
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            comment, section = _comment(comments, end + 1, node.lineno)
            name, text = node.target.id, ast.unparse(node.annotation)
            hint: Any = Any
            default = None
            try:
                hint = _hint(node.annotation)
            except ValueError:
                problems.append(
                    f"{file}:{node.lineno}: {name}: the type {text} is none of {_ALLOWED}"
                )
            try:
                default = _value(node.value) if node.value else None
            except ValueError:
                problems.append(f"{file}:{node.lineno}: {name}: {_NOT_LITERAL}")
            required = node.value is None
            fields.append(Field(name, text, hint, default, required, comment, section))
        end = node.end_lineno or end
    if problems:
        raise ConfigError(f"the Config of {file} cannot be read", problems)
    return fields


def _hint(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name) if name in _HINTS:
            return _HINTS[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union(_hint(left), _hint(right))
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = ast.literal_eval(choices)
            return typing.Literal[values]
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return types.GenericAlias(list, (_hint(item),))
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, value])):
            return types.GenericAlias(dict, (_hint(key), _hint(value)))
    raise ValueError(ast.unparse(node))


def _union(left: Any, right: Any) -> Any:
    found = left | right
    members = [each for each in typing.get_args(found) if each is not type(None)]
    if len(members) > 1 and not all(each in (int, float, str, bool) for each in members):
        raise ValueError("OmegaConf has unions of scalars only")
    return found


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id="component"), args=[ast.Constant(value=str(path))]):
            return {KEY: path} | {
                each.arg: _value(each.value) for each in node.keywords if each.arg
            }
        case ast.Call(
            func=ast.Name(id="field"),
            keywords=[ast.keyword(arg="default_factory", value=ast.Lambda(body=body))],
        ):
            return _value(body)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(keys):
            return {ast.literal_eval(k): _value(v) for k, v in zip(keys, values, strict=True) if k}
    return ast.literal_eval(node)


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Return line -> (a comment's text, does it stand alone)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.lstrip("#").strip(), alone)
    return found


def _comment(comments: dict[int, tuple[str, bool]], start: int, line: int) -> tuple[str, str]:
    """Return comment and section heading of the field at `line`; the one before ends at `start`."""
    section, block = "", []
    for each in range(start, line):
        text, alone = comments.get(each, ("", False))
        if alone:
            block.append(text)
        elif block:
            section, block = " ".join(block), []
    trailing = comments.get(line)
    return trailing[0] if trailing else "\n".join(block), section


def _read_supplied(tree: ast.Module) -> dict[str, list[str]] | None:
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="SUPPLIED")], value=ast.Dict() as table)
                | ast.AnnAssign(target=ast.Name(id="SUPPLIED"), value=ast.Dict() as table)
            ):
                return {key: list(names) for key, names in ast.literal_eval(table).items()}
    return None
