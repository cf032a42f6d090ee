"""From a recipe, a YAML file and overrides to one checked config, with every problem found."""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mytune.config.components import allow, refusal
from mytune.config.foreign import called_here
from mytune.config.overrides import apply_overrides
from mytune.config.redact import misplaced_secrets, redact
from mytune.config.schema import Schema, read_schema
from mytune.config.torchtune import RETIRED, our_name
from mytune.config.tree import Tree, merge
from mytune.config.typed import bad_reference, make_typed, resolve, show
from mytune.config.types import KEY, Keys, components
from mytune.config.yaml_text import read_yaml, write_yaml
from mytune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig


_TEXT = "_yaml"  # where a Config carries the text it was read from
T = TypeVar("T")


def config_yaml(config: Any) -> str:
    """Return a recipe's `Config` as YAML to keep: `${...}` stays, secrets are hidden."""
    return getattr(config, _TEXT, None) or write_yaml(redact(asdict(config)))


@dataclass
class LoadedConfig:
    """A recipe's config. `problems` is empty unless it comes from `read_config`."""

    schema: Schema
    tree: Tree
    typed: DictConfig
    resolved: dict[str, Any]

    @property
    def problems(self) -> list[str]:
        return [redact(each) for each in self.tree.problems]

    @property
    def notices(self) -> list[str]:
        """What the user should know: torchtune's names, keys ignored, arguments dropped."""
        return [redact(each) for each in self.tree.notices]

    def values(self) -> dict[str, Any]:
        """Return plain values for `Config(**values)`: typed, references filled in."""
        return copy.deepcopy(self.resolved)

    def build(self, config_class: type[T]) -> T:
        """Return the recipe's `Config`, filled; `config_yaml` gives its text."""
        config = config_class(**self.values())
        setattr(config, _TEXT, self.to_yaml())
        return config

    def where(self, key: str) -> str:
        """Return what set `key`: `file.yaml:12`, an override, or the recipe's default."""
        return str(redact(self.tree.where(tuple(key.split(".")))))

    def to_yaml(self, sort: bool = False) -> str:
        """Return the whole config, each key below its comment; keeps `${...}`, hides secrets."""
        from omegaconf import OmegaConf

        values = redact(OmegaConf.to_container(self.typed))
        fields = [each for each in self.schema.fields if each.name in self.tree.values]
        text, section, was_block = "", "", False
        for field in sorted(fields, key=lambda each: each.name) if sort else fields:
            is_block = isinstance(values[field.name], dict) and len(values[field.name]) > 0
            new = not sort and field.section not in ("", section)
            heading = f"# {field.section}\n\n" if new else ""
            text += "\n" if text and (heading or is_block or was_block) else ""
            text += heading + "".join(f"# {line}\n" for line in field.comment.splitlines())
            text += write_yaml({field.name: values[field.name]})
            section, was_block = field.section or section, is_block
        return text


def load_config(
    recipe_file: Path,
    config_file: Path | None,
    overrides: Sequence[str] = (),
    *,
    allow_components: Sequence[str] = (),
) -> LoadedConfig:
    """Return the config or raise a `ConfigError` with all that is wrong; imports no component."""
    loaded = read_config(recipe_file, config_file, overrides, allow_components=allow_components)
    if loaded.problems:
        raise config_error(loaded.problems)
    return loaded


def config_error(problems: Sequence[str]) -> ConfigError:
    """Return the error that lists `problems`; a single one is the message itself."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError(f"the config has {len(problems)} problems", sorted(problems, key=_line))


def _line(problem: str) -> int:
    found = re.match(r".*?:(\d+): ", problem)
    return int(found[1]) if found else sys.maxsize  # what is not in the file comes last


def read_config(
    recipe_file: Path,
    config_file: Path | None,
    overrides: Sequence[str] = (),
    *,
    allow_components: Sequence[str] = (),
) -> LoadedConfig:
    """Like `load_config`, but leaves the problems in the result; `check_components` has more."""
    schema = read_schema(recipe_file)
    allow(allow_components)
    tree = Tree(schema, {f.name: copy.deepcopy(f.default) for f in schema.fields if not f.required})
    name = _shown(config_file or recipe_file)
    read = config_file is None or _read_file(tree, config_file, name)
    apply_overrides(tree, overrides)
    tree.values = {key: _translate(tree, value, (key,)) for key, value in tree.values.items()}
    _check_keys(tree)
    if read:
        _check_missing(tree, name)
    typed = make_typed(tree)
    resolved = resolve(tree, typed)
    for path in misplaced_secrets(resolved):
        if not tree.where(path).startswith("override "):
            tree.problem(path, f"a secret of the environment is no part of {path[-1]}")
    allow(_folders_of_tasks(tree, resolved))
    _check_components(tree, resolved)
    return LoadedConfig(schema, tree, typed, resolved)


def _shown(file: Path) -> str:
    return os.path.relpath(file) if file.resolve().is_relative_to(Path.cwd()) else str(file)


def _folders_of_tasks(tree: Tree, resolved: dict[str, Any]) -> Iterator[str]:
    """Yield the folders of tasks, which may run code, that the command line itself names."""
    for key, value in resolved.items():
        if not tree.where((key,)).startswith("override "):
            continue
        files = value if key.endswith("tasks") and isinstance(value, list) else []
        found = [os.path.dirname(each) for each in files if str(each).endswith(".yaml")]
        if key.endswith("include_path") and isinstance(value, str):
            found.append(value)
        # Whole paths: no component begins with one.
        yield from (os.path.abspath(os.path.expanduser(folder)) for folder in found)


def _read_file(tree: Tree, file: Path, name: str) -> bool:
    """Put a file's values into the tree; return False if it could not be read as YAML."""
    try:
        document = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config {name}: {why}") from None
    tree.problems += [f"{name}:{line}: {text}" for line, text in document.problems]
    tree.values = merge(tree.values, document.values)
    tree.places = {path: f"{name}:{line}" for path, line in document.lines.items()}
    return bool(document.values) or not document.problems


def _translate(tree: Tree, node: Any, path: Keys) -> Any:
    """Return `node` with our names for torchtune's, and without references of a wrong kind."""
    if isinstance(node, dict):
        return {key: _translate(tree, value, (*path, key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_translate(tree, value, (*path, str(i))) for i, value in enumerate(node)]
    if not isinstance(node, str):
        return node
    if why := bad_reference(node):
        tree.problem(path, why)
        return "???"  # OmegaConf's word for a value that is missing
    name = our_name(node) if path[-1] == KEY or node.startswith("torchtune.") else node
    if name != node:
        same = name == node.replace("torchtune.", "mytune.", 1)
        notice = "torchtune.X is mytune.X here" if same else f"{node} is {name} here"
        tree.notices += [notice] if notice not in tree.notices else []
    return name


def _check_keys(tree: Tree) -> None:
    """Report unknown keys; take retired ones out."""
    names = tree.schema.names
    for key in [key for key in tree.values if key not in names]:
        value, where = tree.values.pop(key), tree.where((key,))
        if key not in RETIRED:
            inner = [
                f"{k}.{key}" for k, v in tree.values.items() if isinstance(v, dict) and key in v
            ]
            hint = f"; did you mean {inner[0]!r}?" if inner else did_you_mean(key, names)
            here = called_here(key, names)
            hint = f"; here it is {here}" if here else hint
            tree.problems.append(f"{where}: unknown key {key!r}{hint}")
            continue
        harmless, why = RETIRED[key]
        if harmless is None or value in harmless:
            tree.notices.append(f"{where}: {key} is ignored: {why}")
        else:
            remedy = f"remove it or write {show(harmless[0])}"
            tree.problem((key,), f"{show(value)} is not supported: {why}; {remedy}")


def _check_missing(tree: Tree, name: str) -> None:
    """Report keys that the recipe needs and the config has not."""
    for field in tree.schema.fields:
        if field.name not in tree.values:
            about = f": {field.comment.splitlines()[0]}" if field.comment else ""
            what = f"the key {field.name!r} is missing ({field.type}{about})"
            tree.problems.append(f"{name}: {what}")


def _check_components(tree: Tree, resolved: dict[str, Any]) -> None:
    """Report component keys that hold no component, and components that may not be built."""
    for field in tree.schema.fields:
        value = resolved.get(field.name)
        checked = field.is_component and field.name in resolved and tree.sound(field.name)
        nodes = value if isinstance(value, list) and value else [value]
        right = all(isinstance(each, dict) and KEY in each for each in nodes)
        if checked and not right and not (value is None and field.optional):
            tree.problem((field.name,), f"{show(value)} is not a component: a mapping with {KEY}")
    for path, node in components(resolved):
        name = node[KEY]
        why = refusal(name) if isinstance(name, str) else f"{show(name)} is not a dotted name"
        if why and (*path, KEY) not in tree.broken:
            tree.problem((*path, KEY), why)
