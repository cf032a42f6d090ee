"""Commands in pages, held against the command line's own parsers and the recipes' schemas."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mytune.cli import registry
from mytune.cli.main import VERBS
from mytune.cli.parser import Parser
from mytune.cli.run import split
from mytune.config import check_components, read_config
from mytune.errors import ConfigError, TuneError
from tests.docs.pages import ROOT

_SEPARATORS = {";", ">", "&", "&&", "|", "||", "(", ")", "do", "then"}
_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*")
_EXTRAS = re.compile(r"^(\w+) = \[", re.MULTILINE)


def typed(text: str) -> Iterator[list[str]]:
    """Yield each simple command of a shell text as its words, without variables set before it."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _SEPARATORS:
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words
            words = []


def is_placeholder(word: str) -> bool:
    """Say whether a word stands for something of the reader's."""
    return _PLACEHOLDER.fullmatch(word) is not None


class Checker:
    """Checks the commands of one page in order; remembers the files that they and the page make.

    Args:
        files: name -> the config that a file of the page is.
    """

    def __init__(self, files: set[str]) -> None:
        self.files = files
        self.copies: dict[str, str] = {}  # file -> what `tune cp` made it from

    def problems(self, words: list[str]) -> list[str]:
        """Return what is wrong with a command; nothing if it is not one that is known here."""
        try:
            match words:
                case ["tune", *rest]:
                    return self._tune(rest)
                case ["make", *targets]:
                    return self._make(targets)
                case ["pip", "install", *rest]:
                    return self._pip(rest)
        except ConfigError as error:
            return [str(error)]
        return []

    def _make(self, targets: list[str]) -> list[str]:
        known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [f"no target {each}" for each in targets if each not in known]

    def _pip(self, words: list[str]) -> list[str]:
        wanted = {
            name for each in re.findall(r"\[(.*)\]", " ".join(words)) for name in each.split(",")
        }
        project = (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2]
        return [f"no extra {each}" for each in wanted - set(_EXTRAS.findall(project))]

    def _tune(self, words: list[str]) -> list[str]:
        if not words or words == ["--version"] or words == ["--help"]:
            return []
        verb, *rest = words
        if verb not in VERBS:
            return [f"no command {verb}"]
        parser: Parser = importlib.import_module(f"mytune.cli.{verb}").parser()
        if verb == "run":
            rest = split(rest)[1]
        args = parser.parse_intermixed_args(rest)
        match verb:
            case "ls" if args.recipe and not is_placeholder(args.recipe):
                registry.find_recipe(args.recipe)
            case "cp":
                return self._copy(args.name, args.destination)
            case "cat":
                self._config(args.config)
            case "validate":
                recipe = self._recipe(args.recipe) if args.recipe else None
                return self._settings(recipe, args.config, args.overrides, args.allow_component)
            case "chat":
                return wrong_settings(registry.ROOT / "recipes" / "chat.py", None, args.overrides)
            case "run":
                recipe = self._recipe(args.recipe)
                return self._settings(recipe, args.config, args.overrides, args.allow_component)
        return []

    def _copy(self, name: str, destination: str) -> list[str]:
        if name not in registry.RECIPES and not is_placeholder(name):
            registry.find_config(name)
        self.copies[destination] = name
        return []

    def _recipe(self, name: str) -> Path | None:
        """Return a recipe's file; None for a placeholder. Raises ConfigError if there is none."""
        return None if is_placeholder(name) else registry.find_recipe(self.copies.get(name, name))

    def _config(self, name: str) -> Path | None:
        """Return a config's file; None for a placeholder or a file of the reader's."""
        name = self.copies.get(name, name)
        if is_placeholder(name) or (name.startswith("my_") and name not in self.files):
            return None
        return registry.find_config(name)

    def _settings(
        self, recipe: Path | None, config: str | None, overrides: list[str], allowed: list[str]
    ) -> list[str]:
        file = self._config(config) if config else None
        if recipe is None:
            if file is None or config is None:
                return []
            recipe = registry.recipe_for(self.copies.get(config, config))
        return wrong_settings(recipe, file, overrides, allowed)


def wrong_settings(
    recipe: Path, config: Path | None, overrides: list[str], allowed: list[str] | None = None
) -> list[str]:
    """Return problems with a config, except values and files that only the reader has."""
    try:
        loaded = read_config(recipe, config, overrides, allow_components=allowed or [])
        found = loaded.problems + check_components(loaded, files=False)
    except TuneError as error:
        return [str(error)]
    elsewhere = ["needs the package", "Environment variable"]
    if config is None:
        elsewhere += ["is missing", "is not a component"]
    return [each for each in found if not any(words in each for words in elsewhere)]
