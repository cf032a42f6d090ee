"""YAML text: strict reading that knows the line of every key, and readable writing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from mytune.config.types import Keys, dotted

SPACE = "a space after its colon"
MAX_NODES = 20_000  # what a file may expand to through its aliases

# YAML 1.1, but `1e-4` is a number, `00005` and `12:30` are text, `None` is null.
_PLAIN = [
    ("null", r"~|null|Null|NULL|None|", "~nN"),
    ("bool", r"(?i:yes|no|true|false|on|off)", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
]


class _Loader(yaml.SafeLoader):
    """Notes explicit tags instead of obeying them. (libyaml is faster: deep nesting crashes it.)"""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name for it)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tags: list[tuple[int, str]] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            self.tags.append((event.start_mark.line + 1, event.tag))
            event.tag = None
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or our reading of it would take for something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""]
        )


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


@dataclass
class Document:
    """What a YAML file says: plain values, the line of each key, what is wrong (line, text)."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Keys, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def read_yaml(text: str) -> Document:
    """Read a mapping with text keys; duplicate keys, tags, cycles, alias bombs are problems."""
    document = Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document.problems += [
            (n, f"YAML tag {tag!r}: write a plain value") for n, tag in loader.tags
        ]
        if not isinstance(node, yaml.MappingNode):
            what = (
                "the file is empty" if node is None else "a config is a mapping of keys to values"
            )
            document.problems.append((1, f"{what}: write `key: value` lines"))
            return document
        document.values = _Reader(loader, document).read(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.problems.append((mark.line + 1 if mark else 1, f"not valid YAML: {error.problem}"))
    except yaml.YAMLError as error:
        document.problems.append((1, f"not valid YAML: {error}"))
    except RecursionError:
        document.problems.append((1, "nested too deeply, or an alias contains itself"))
    except OverflowError as error:
        document.problems.append((1, str(error)))
    return document


class _Reader:
    """Turns nodes into plain values, noting lines and problems in a document."""

    def __init__(self, loader: _Loader, document: Document) -> None:
        self.loader, self.document, self.count = loader, document, 0

    def read(self, node: yaml.Node, path: Keys) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise OverflowError(f"aliases expand to more than {MAX_NODES} values")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, str(i))) for i, item in enumerate(node.value)]
        return self.scalar(node)

    def scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError:  # more digits than Python converts
            self.problem(node, "not a number that can be used")
            return None

    def mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        inherited: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                bases = self.read(value_node, path)
                for base in reversed(bases if isinstance(bases, list) else [bases]):
                    inherited |= base if isinstance(base, dict) else {}
                continue
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                self.problem(key_node, f"the key {key!r} is not text: put it in quotes")
                continue
            nothing = value_node.value == "" and not value_node.style
            if node.flow_style and nothing and ":" in key and not key_node.style:
                self.problem(key_node, f"{key!r} lacks {SPACE}")
                continue
            if key in first:
                name = dotted((*path, key))
                self.problem(key_node, f"{name} is given twice; the first is on line {first[key]}")
                continue
            first[key] = line
            self.document.lines[(*path, key)] = line
            found[key] = self.read(value_node, (*path, key))
        return inherited | found

    def problem(self, node: yaml.Node, text: str) -> None:
        self.document.problems.append((node.start_mark.line + 1, text))


def read_value(text: str) -> Any:
    """Read an override's value: null, boolean, number, "text", [list], {mapping}; else it is text.

    Raises ValueError if a list or mapping is malformed.
    """
    if text[:1] in ("[", "{", '"', "'"):
        document = read_yaml(f"{{value: {text}}}")
        if not document.problems and document.values.keys() == {"value"}:
            return document.values["value"]
        told = [problem for _, problem in document.problems if problem.endswith(SPACE)]
        if told and text[0] in "[{":
            raise ValueError(f"{told[0]}; then all of it needs quotes")
        if text[0] in "[{":
            raise ValueError(
                "not a YAML list or mapping; for a text that begins so, quote it twice"
            )
        return text
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    if tag == "tag:yaml.org,2002:merge":
        return text
    return loader.construct_object(yaml.ScalarNode(tag, text))


def write_yaml(values: dict[str, Any]) -> str:
    """Write plain values: blocks for mappings, `[a, b]` for lists of scalars."""
    return yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=10**6,
    )
