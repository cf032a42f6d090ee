"""From a recipe's schema, a YAML file and overrides to one checked config: every problem found, none raised midway."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from mytune.config.instantiate import allow, refusal
from mytune.config.overrides import Tree, apply_overrides, lookup, merge
from mytune.config.redact import redact
from mytune.config.schema import Field, Schema, read_schema
from mytune.config.torchtune import RETIRED, our_name
from mytune.config.types import KEY, Path, children, components
from mytune.config.yaml_text import read_yaml, write_yaml
from mytune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

_MAX_TEXT = 1_000_000  # characters that references may expand to
_UNESCAPED = r"(?<!\\)(?:\\\\)*\$\{"
_REFERENCE = re.compile(_UNESCAPED + r"([A-Za-z_][\w.-]*)\}")
_BAD_REFERENCE = re.compile(_UNESCAPED + r"(?!oc\.env:|[A-Za-z_][\w.-]*\})")
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


@dataclass
class LoadedConfig:
    """A recipe's config. `problems` is empty unless it comes from `read_config`."""

    schema: Schema
    typed: DictConfig
    resolved: dict[str, Any]
    tree: Tree

    @property
    def problems(self) -> list[str]:
        return [redact(each) for each in self.tree.problems]

    @property
    def notices(self) -> list[str]:
        """What the user should know: torchtune's names that were mapped, keys ignored, arguments dropped."""
        return [redact(each) for each in self.tree.notices]

    def values(self) -> dict[str, Any]:
        """Return plain values for `Config(**values)`: typed, references filled in."""
        return copy.deepcopy(self.resolved)

    def where(self, key: str) -> str:
        """Return what set `key`: `file.yaml:12`, an override, or the recipe's default."""
        where: str = redact(self.tree.where(tuple(key.split("."))))
        return where

    def to_yaml(self, sort: bool = False) -> str:
        """Return the whole config with each key's comment above it; `${...}` is kept, secrets are hidden."""
        from omegaconf import OmegaConf

        values = redact(OmegaConf.to_container(self.typed))
        fields = [each for each in self.schema.fields if each.name in self.tree.values]
        text, section, gap = "", "", False
        for field in sorted(fields, key=lambda each: each.name) if sort else fields:
            block = bool(children(values[field.name])) and isinstance(values[field.name], dict)
            heading = "" if sort or field.section in ("", section) else f"# {field.section}\n\n"
            section = field.section
            text += "\n" if text and (heading or block or gap) else ""
            text += heading + "".join(f"# {line}\n" for line in field.comment.splitlines())
            text += write_yaml({field.name: values[field.name]})
            gap = block
        return text


def load_config(
    recipe_file: File,
    config_file: File | None,
    overrides: Sequence[str] = (),
    *,
    allow_components: Sequence[str] = (),
) -> LoadedConfig:
    """Return the config, or raise a `ConfigError` with everything that is wrong with it; imports no component."""
    loaded = read_config(recipe_file, config_file, overrides, allow_components=allow_components)
    if loaded.problems:
        raise config_error(loaded.problems)
    return loaded


def config_error(problems: Sequence[str]) -> ConfigError:
    """Return the error that lists `problems`."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError(f"the config has {len(problems)} problems", problems)


def read_config(
    recipe_file: File,
    config_file: File | None,
    overrides: Sequence[str] = (),
    *,
    allow_components: Sequence[str] = (),
) -> LoadedConfig:
    """Like `load_config`, but leaves the problems in the result: `check_components` can add its own."""
    schema = read_schema(recipe_file)
    allow(allow_components)
    tree = Tree(schema, {f.name: copy.deepcopy(f.default) for f in schema.fields if not f.required})
    if config_file is not None:
        _read_file(tree, config_file)
    apply_overrides(tree, overrides)
    tree.values = {key: _translate(tree, value, (key,)) for key, value in tree.values.items()}
    _check_keys(tree, config_file)
    typed = _typed(tree)
    resolved = _resolved(tree, typed)
    _check_components(tree, resolved)
    return LoadedConfig(schema, typed, resolved, tree)


def _read_file(tree: Tree, file: File) -> None:
    name = os.path.relpath(file) if file.resolve().is_relative_to(File.cwd().resolve()) else str(file)
    try:
        document = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config {name}: {why}") from None
    tree.problems += [f"{name}:{line}: {text}" for line, text in document.problems]
    tree.values = merge(tree.values, document.values)
    tree.places = {path: f"{name}:{line}" for path, line in document.lines.items()}


def _translate(tree: Tree, node: Any, path: Path) -> Any:
    """Return `node` with torchtune's names replaced by ours; references of a kind we do not fill in are problems."""
    if isinstance(node, dict):
        return {key: _translate(tree, value, (*path, key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_translate(tree, value, (*path, str(i))) for i, value in enumerate(node)]
    if not isinstance(node, str):
        return node
    if _BAD_REFERENCE.search(node):
        tree.problem(path, f"{node!r}: only ${{key}} and ${{oc.env:NAME}} are filled in; for the text itself write \\${{")
    name = our_name(node) if path[-1] == KEY or node.startswith("torchtune.") else node
    if name != node and (notice := f"{node} is {name} here") not in tree.notices:
        tree.notices.append(notice)
    return name


def _check_keys(tree: Tree, config_file: File | None) -> None:
    """Report unknown and missing keys; take retired ones out."""
    names = tree.schema.names
    for key in [key for key in tree.values if key not in names]:
        value, where = tree.values.pop(key), tree.where((key,))
        if key not in RETIRED:
            tree.problems.append(f"{where}: unknown key {key!r}{did_you_mean(key, names)}")
            continue
        harmless, why = RETIRED[key]
        if harmless is None or value in harmless:
            tree.notices.append(f"{where}: {key} is ignored: {why}")
        else:
            tree.problem((key,), f"{_show(value)} is not supported: {why}; remove it or write {_show(harmless[0])}")
    for field in tree.schema.fields:
        if field.name not in tree.values:
            where = str(config_file or tree.schema.file)
            about = f": {field.comment.splitlines()[0]}" if field.comment else ""
            tree.problems.append(f"{where}: the key {field.name!r} is missing ({field.type}{about})")


def _typed(tree: Tree) -> DictConfig:
    """Return an OmegaConf structured config, made from the schema, with the values that fit their types."""
    from omegaconf import MISSING, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    fields = [(f.name, f.hint, dataclasses.field(default=MISSING)) for f in tree.schema.fields]
    config: DictConfig = OmegaConf.structured(dataclasses.make_dataclass("Config", fields))
    for field in tree.schema.fields:
        if field.name in tree.values and field.name not in tree.broken:
            value = tree.values[field.name]
            try:
                OmegaConf.update(config, field.name, value, merge=False)
            except OmegaConfBaseException:
                tree.problem((field.name,), f"{_show(value)} is not {_expected(field, value)}")
    return config


def _expected(field: Field, value: Any) -> str:
    if typing.get_origin(field.hint) is typing.Literal or field.kind.startswith("Literal"):
        choices = [each for each in _choices(field.hint) if each is not None]
        words = f"one of {', '.join(map(repr, choices))}"
        return words + did_you_mean(str(value), map(str, choices))
    return _WORDS.get(field.kind, field.kind) + (" or null" if field.optional else "")


def _show(value: Any) -> str:
    return "null" if value is None else repr(value)


def _resolved(tree: Tree, typed: DictConfig) -> dict[str, Any]:
    """Return plain values with references filled in; what cannot be filled in is a problem and left out."""
    try:
        _spend(tree.values, tree.values, [_MAX_TEXT])
    except (OverflowError, RecursionError):
        tree.problems.append("the ${...} references go round in a circle or expand without end")
        return {}
    present = [name for name in tree.schema.names if name in tree.values and name not in tree.broken]
    return {name: _resolve(tree, typed, name, (name,)) for name in present}


def _spend(values: dict[str, Any], node: Any, budget: list[int]) -> None:
    """Count what `node` stands for when every reference in it is filled in; OverflowError beyond the budget."""
    budget[0] -= 1 + len(node) if isinstance(node, str) else 1
    if budget[0] < 0:
        raise OverflowError
    for _, child in children(node):
        _spend(values, child, budget)
    for key in _REFERENCE.findall(node) if isinstance(node, str) else ():
        with contextlib.suppress(LookupError, ValueError):  # reported where it is filled in
            _spend(values, lookup(values, tuple(key.split("."))), budget)


def _resolve(tree: Tree, container: Any, key: Any, path: Path) -> Any:
    from omegaconf import DictConfig, ListConfig
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = container[key]
    except OmegaConfBaseException as error:
        why = str(error.__cause__ or error).splitlines()[0]
        ...
        return None
    if isinstance(value, DictConfig):
        return {each: _resolve(tree, value, each, (*path, str(each))) for each in value}
    if isinstance(value, ListConfig):
        return [_resolve(tree, value, i, (*path, str(i))) for i in range(len(value))]
    return value


def _check_components(tree: Tree, resolved: dict[str, Any]) -> None:
    """Report component keys without a component, and components that may not be built."""
    for field in tree.schema.fields:
        value = resolved.get(field.name)
        many = isinstance(value, list) and field.kind == "Components"
        for path, each in children(value) if many else [((), value)]:
            ...
    for path, node in components(resolved):
        name = node[KEY]
        why = refusal(name) if isinstance(name, str) else f"{_show(name)} is not a dotted name"
        if why:
            tree.problem((*path, KEY), why)
