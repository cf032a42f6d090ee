"""How a command ends: one line for an error, an exit code, a traceback if asked for."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from mytune.cli.registry import ROOT
from mytune.errors import (
    ConfigError,
    ResourceError,
    StoppedEarly,
    TuneError,
    first_line,
    is_out_of_memory,
    printable,
)

if TYPE_CHECKING:
    from traceback import FrameSummary

DEBUG = "MYTUNE_DEBUG"  # environment variable, so that the workers of a run see it too

_ENVIRONMENT = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EFBIG: "a file would be larger than its limit (ulimit -f, or the disk's)",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENAMETOOLONG: "the name of a file is too long",
}
_PACKAGE = str(Path(__file__).parents[1])


def take_debug(words: Sequence[str]) -> list[str]:
    """Return a command line without `--debug`, and note whether it was there."""
    if "--debug" in words:
        os.environ[DEBUG] = "1"
    return [word for word in words if word != "--debug"]


def open_streams() -> None:
    """Put the null device in the place of closed streams, and let no character end the process.

    A file that is opened would else take their place, and what is printed would go there. Processes
    that are started have it, too.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    null = partial(open, os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    sys.stdout, sys.stderr = sys.stdout or null(), sys.stderr or null()
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def report(work: Callable[[], int | None]) -> int:
    """Do `work`, print how it failed if it did, and return the exit code."""
    code, text = outcome(work)
    say(text)
    return code


def say(text: str) -> None:
    """Print a text on stderr, if there is any: what went wrong there must not change a command."""
    if text:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def outcome(work: Callable[[], int | None]) -> tuple[int, str]:
    """Do `work` and return the exit code and what to print on stderr; never raises."""
    try:
        code = work() or 0
        if sys.stdout:  # None, if it was closed before
            sys.stdout.flush()
        return code, ""
    except SystemExit as end:  # argparse's --help, or a recipe's own
        if end.code is None or isinstance(end.code, int):
            return end.code or 0, ""
        return 1, str(end.code)
    except KeyboardInterrupt:
        return 130, ""
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141, ""
        return _explain(error)


def _nobody_reads() -> bool:
    """Say whether stdout is a pipe without a reader (`tune ls | head`); if so, leave it alone."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def _explain(error: Exception) -> tuple[int, str]:
    from mytune.config.redact import redact

    known = error if isinstance(error, TuneError) else _environment(error)
    if DEBUG in os.environ:
        say(_traceback(error))
    told = known or _bug(error)
    kind = "stopped early" if isinstance(told, StoppedEarly) else "error"
    return told.exit_code, printable(redact(f"{kind}: {told}"))


def _environment(error: Exception) -> TuneError | None:
    """Return what the machine lacks, or cannot do, if that is why `error` was raised."""
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        where = error.filename2 or error.filename
        return ResourceError(_ENVIRONMENT[error.errno] + (f": {where}" if where else ""))
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("mytune"):
        return ResourceError(_not_installed(str(error.name)))
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's word
        return ResourceError("a path begins with ~, and that user has no home directory")
    if isinstance(error, ValueError) and str(error) == "embedded null byte":
        return ConfigError("a path has a null character in it, which no file can have")
    if is_out_of_memory(error):
        why = first_line(error).rpartition("DefaultCPUAllocator: ")[2]
        return ResourceError(f"out of memory: {why}; a smaller batch_size needs less")
    return None


def _not_installed(name: str) -> str:
    top = name.partition(".")[0]
    here = [each for each in (f"{top}.py", top) if Path(each).exists()]
    if here:
        what = f"there is no module {name!r} where Python looks, but {here[0]} is here"
        return f"{what}: run what is below this folder, or set PYTHONPATH=."
    return f"the package {name!r} is not installed: pip install it"


@contextmanager
def may_be_theirs(places: Sequence[str]) -> Iterator[None]:
    """Say of an error that nobody foresaw that it may be in a component of the user's.

    Args:
        places: the files, relative to the current directory, and packages of such components.
    """
    try:
        yield
    except (TuneError, BrokenPipeError):
        raise
    except Exception as error:
        frames = _frames(error)
        files = [os.path.abspath(place) for place in places]
        theirs = [f"{each.filename}:{each.lineno}" for each in frames if each.filename in files]
        is_ours = _is_ours(frames[-1])
        if not places or _environment(error) or not (theirs or is_ours):
            raise
        where = f"; it may be in {(theirs or [', '.join(places)])[-1]}" if is_ours else ""
        told = f"{_line(error)}{where}, a component of yours; {_kept(error)}"
        raise ConfigError(told) from error


def _bug(error: Exception) -> TuneError:
    """Return the line for an error that nobody foresaw; a file keeps its traceback."""
    whose = "a bug of mytune" if _is_ours(_frames(error)[-1]) else "a bug"
    return TuneError(f"{whose}: {_line(error)}; {_kept(error)}")


def _frames(error: Exception) -> list[FrameSummary]:
    """Return the frames of an error that are in no library, or all if there are none."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    libraries = (sys.prefix, sys.base_prefix, "<")
    near = [each for each in frames if _is_ours(each) or not each.filename.startswith(libraries)]
    return near or frames


def _is_ours(frame: FrameSummary) -> bool:
    return frame.filename.startswith((_PACKAGE, str(ROOT / "recipes")))


def _line(error: Exception) -> str:
    last = _frames(error)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({last.filename}:{last.lineno})"


def _kept(error: Exception) -> str:
    """Write an error's traceback to a file, and return where it is."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", prefix="mytune-", suffix=".txt", delete=False) as file:
        file.write(_traceback(error))
    return f"the traceback is in {file.name}, --debug prints it"


def _traceback(error: Exception) -> str:
    import traceback

    from mytune.config.redact import redact

    return str(redact("".join(traceback.format_exception(error))))
