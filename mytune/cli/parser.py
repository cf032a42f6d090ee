"""The argument parser of every command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from mytune.errors import ConfigError, did_you_mean


def setting_of(words: Sequence[str]) -> tuple[str, str]:
    """Return what `--key=value`, `--key value` or `--key` alone would be as a setting."""
    name, equals, value = words[0].lstrip("-").partition("=")
    following = words[1] if len(words) > 1 and not re.match("--|.*=", words[1]) else "true"
    return name.replace("-", "_"), value if equals else following


class Parser(argparse.ArgumentParser):
    """Raises a `ConfigError` where argparse would print its usage and exit."""

    may_be_empty: Collection[str] = ()  # options

    def __init__(self, verb: str, **options: Any) -> None:
        super().__init__(prog=f"tune {verb}", allow_abbrev=False, **options)

    def add_config_arguments(self) -> None:
        """Add what `run` and `validate` share: overrides, and which components they may name."""
        self.add_argument(
            "overrides", nargs="*", metavar="key=value", help="override a key; ~key resets it"
        )
        self.add_argument(
            "--allow-component",
            action="append",
            default=[],
            metavar="NAME",
            help="let the config name components of the package NAME; repeatable",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but refuse an option's empty value."""
        self._refuse_empty(args)
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Do the same where argparse does not ask the other one (Python 3.13)."""
        self._refuse_empty(args)
        return super().parse_known_intermixed_args(args, namespace)

    def _refuse_empty(self, args: Any) -> None:
        """Refuse an empty value of an option: a variable of the shell was not set."""
        for word, following in pairwise([*(args or ()), "-"]):
            option, equals, value = word.partition("=")
            checked = option in self._option_string_actions and option not in self.may_be_empty
            if checked and not (value if equals else following):
                self.error(f"argument {option}: its value is empty")

    def near(self, option: str) -> str:
        """Return `"; did you mean '--x'?"`, or nothing."""
        names = [name for name in self._option_string_actions if name not in ("-h", "--help")]
        return did_you_mean(option.partition("=")[0], names)

    def error(self, message: str) -> NoReturn:
        told = message.replace(", key=value", "")  # which need not be there
        unknown = told.partition("unrecognized arguments: ")[2]
        near = self.near(unknown.split()[0]) if unknown else ""
        if unknown and any(action.dest == "overrides" for action in self._actions):
            key, value = setting_of(unknown.split())
            near = "; settings are key=value, without --" + (near or f": {key}={value}")
        raise ConfigError(told + (near or f"; see `{self.prog} --help`"))
