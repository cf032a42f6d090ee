"""The argument parser of every command."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from mytune.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Raises a `ConfigError` where argparse would print its usage and exit."""

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

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Refuse an empty value of an option: a variable of the shell was not set."""
        found, others = super().parse_known_args(*args, **options)
        for action in self._actions:
            if action.option_strings and getattr(found, action.dest, None) == "":
                self.error(f"argument {action.option_strings[-1]}: its value is empty")
        return found, others

    def near(self, option: str) -> str:
        """Return `"; did you mean '--x'?"`, or nothing."""
        names = [name for name in self._option_string_actions if name not in ("-h", "--help")]
        return did_you_mean(option.partition("=")[0], names)

    def error(self, message: str) -> NoReturn:
        told = message.replace(", key=value", "")  # which need not be there
        unknown = told.partition("unrecognized arguments: ")[2]
        near = self.near(unknown.split()[0]) if unknown else ""
        raise ConfigError(told + (near or f"; see `{self.prog} --help`"))
