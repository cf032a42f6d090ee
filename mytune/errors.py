"""Errors that a user can act on: what is wrong, how to repair it, and an exit code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class TuneError(Exception):
    """An error with a message for the user; `tune` prints it without a traceback.

    `details` are further lines, only for lists: all problems of a config, all mismatched tensors.
    """

    exit_code = 70

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = list(details)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {line}" for line in self.details)])


class ConfigError(TuneError):
    """A wrong config, override or command line."""

    exit_code = 2


def check_at_least(least: int, numbers: Mapping[str, int | None]) -> None:
    """Raise ConfigError for numbers, by their keys, that are too low, all at once; None is none."""
    low = [f"{key} is {n}" for key, n in numbers.items() if n is not None and n < least]
    if low:
        raise ConfigError(f"{', '.join(low)}; it must be at least {least}")


class MissingTokenizer(ConfigError):
    """There is no tokenizer where the config says."""


class DataError(TuneError):
    """A data file or row that cannot be used; the message names `file:row`."""

    exit_code = 3


class CheckpointError(TuneError):
    """A checkpoint that is missing, corrupt, or does not fit the model."""

    exit_code = 4


class ResourceError(TuneError):
    """The environment lacks something: disk, permission, memory, a device, a package."""

    exit_code = 5


class UnreachableError(ResourceError):
    """Data is elsewhere, and the network does not give it."""


class RanksLost(ResourceError):
    """Other ranks died or do not answer; what is wrong is theirs to say, if they can."""


class NumericalError(TuneError):
    """A loss or gradient that is not finite."""

    exit_code = 6


class DirectoryInUseError(TuneError):
    """The output directory belongs to another run."""

    exit_code = 7


class StoppedEarly(TuneError):
    """The run was asked to stop, has saved, and can be resumed."""

    exit_code = 75


def is_network(error: BaseException | None) -> bool:
    """Say whether an error, or what it comes from, is that the network does not answer.

    HTTP libraries have exceptions of their own for that, which are known by their names.
    """
    while error is not None:
        names = " ".join(kind.__name__ for kind in type(error).__mro__)
        if re.search("ConnectionError|ConnectError|Timeout|gaierror|OfflineMode", names):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the device's memory, or the CPU's, does not suffice."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for it
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't alloc" in str(error))
    )


def printable(text: str) -> str:
    """Return a text without what could steer a terminal: texts of files and models can hold it."""
    return text.translate(_CONTROL)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, candidates: Iterable[str], most: int = 1) -> str:
    """Return `"; did you mean 'x'?"`; "" where no candidate is like `name`.

    `x` is what begins with `name`, or else what is nearest to it, or else what contains it.
    """
    names = list(candidates)
    begun = sorted(each for each in names if len(name) > 3 and each.startswith(name))[:3]
    near = begun or difflib.get_close_matches(name, names, n=most, cutoff=0.6)
    near = near or sorted(each for each in names if len(name) > 3 and name in each)[:3]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


TENSORS = 4  # that an error names: more only scrolls its first line away


def shortened(lines: Sequence[str], shown: int = 24) -> list[str]:
    """Return an error's details, the first ones and how many more there are."""
    more = [f"and {len(lines) - shown} more"] if len(lines) > shown else []
    return [*lines[:shown], *more]
