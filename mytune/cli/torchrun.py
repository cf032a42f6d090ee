"""A recipe in several processes: torchrun's launcher, with our signals and exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mytune.cli.report import DEBUG, say
from mytune.cli.worker import FOLDER, STOP, first_failure, running, silent_ranks
from mytune.errors import ConfigError, TuneError, check_at_least

_WHY: dict[int, str] = {
    signal.SIGKILL: "; the system kills what uses too much memory",
    signal.SIGABRT: "; NCCL ends a rank whose peers do not answer within distributed_timeout",
}


class RankDied(TuneError):
    """A process of the run that ended without a word."""

    def __init__(self, rank: int, code: int) -> None:
        how = f"ended with code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        super().__init__(f"rank {rank} {how}{_WHY.get(-code, '')}")
        self.exit_code = 128 - code if code < 0 else code


def launch(options: Sequence[str], words: Sequence[str]) -> int:
    """Run `words`, a recipe and its arguments, under torchrun.

    Returns the exit code of the rank that failed first and prints what that rank said.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = _parse(options, ["-m", "mytune.cli.worker", *words])
    _share_cores(_processes(args.nproc_per_node))
    with tempfile.TemporaryDirectory(prefix="mytune-") as name, _quiet():
        folder = Path(name)
        failure = None
        try:
            # Where workers leave their outcome; and they import nothing from the cwd.
            settings = {FOLDER: name, "PYTHONSAFEPATH": "1"}
            with _environment(**settings), _pass_signals_on(folder):
                run.run(args)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            codes = [(each.exitcode, rank) for rank, each in error.failures.items()]
            # torchrun ends the others with SIGTERM: that is not what was wrong.
            failure = min(codes, key=lambda each: (each[0] == -signal.SIGTERM, each))
        except SignalException as error:
            return 128 + error.sigval
        attempt = _last_attempt(folder)
        for stopped in folder.glob(f"*/{STOP}"):  # after it no attempt does anything
            attempt = stopped.parent if first_failure(stopped.parent).code else attempt
        first, silent = first_failure(attempt), silent_ranks(attempt)
    if failure and (not first.code or (first.lost and failure[0] < 0)):
        raise RankDied(failure[1], failure[0])
    say(first.text)
    if first.lost and silent:
        say(f"  no word from rank {', '.join(map(str, silent))}")
    return first.code


@contextmanager
def as_one_of(options: Sequence[str]) -> Iterator[None]:
    """Let this process see the number of processes that torchrun would start; none is started.

    Of a range of nodes it is the smallest.
    """
    args = _parse(options)
    per_node = _processes(args.nproc_per_node)
    nodes = args.nnodes.partition(":")[0]
    with _environment(WORLD_SIZE=str(per_node * int(nodes))):
        yield


def _last_attempt(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda each: int(each.name), default=folder)


def _usage_error(message: str) -> NoReturn:
    raise ConfigError(f"torchrun's options: {message}; `torchrun --help` lists them")


def _defaults(options: Sequence[str]) -> list[str]:
    """Return the options that we choose where the user did not."""
    import torch

    given = {option.partition("=")[0].replace("_", "-") for option in options}
    # SIGTERM and SIGINT are passed on by us; under nohup, SIGHUP stays ignored.
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    chosen = [f"--signals-to-handle={'' if ignored else 'SIGHUP,'}SIGQUIT"]
    if "--nproc-per-node" not in given:
        chosen.append(f"--nproc-per-node={torch.cuda.device_count() or 1}")
    if not any(each.startswith(("--rdzv", "--master", "--node", "--nnodes")) for each in given):
        chosen.append("--standalone")
    return chosen


def _parse(options: Sequence[str], what: Sequence[str] = ("none",)) -> argparse.Namespace:
    """Read torchrun's options; `what` it is to run comes last."""
    from torch.distributed import run

    launcher = run.get_args_parser()
    launcher.error = _usage_error  # type: ignore[method-assign]
    args = launcher.parse_args([*_defaults(options), *options, *what])
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", args.nnodes):
        raise ConfigError(f"--nnodes is {args.nnodes}; it can be a number or MIN:MAX")
    return args


def _processes(per_node: str) -> int:
    """Return the number of processes per node that `--nproc-per-node` asks for."""
    from torch.distributed import run

    try:
        processes = int(run.determine_local_world_size(per_node))
    except ValueError as error:
        raise ConfigError(f"--nproc-per-node {per_node}: {error}") from None
    check_at_least(1, {"--nproc-per-node": processes})
    return processes


def _share_cores(processes: int) -> None:
    """Give each process its share of the cores; torchrun would give it one."""
    linux = sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for as long as the block lasts."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the launcher's own log: the failing rank says what is wrong."""
    if DEBUG not in os.environ:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _pass_signals_on(folder: Path) -> Iterator[None]:
    """Pass the first SIGTERM or Ctrl-C on to the workers and wait for them; a second one ends them.

    torchrun itself gives them 30 s, too little to save a large model, and loses their codes.
    """
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        workers = running(_last_attempt(folder))
        if asked or not workers:
            raise SystemExit(128 + number)
        asked.append(number)
        stop = _last_attempt(folder) / STOP
        stop.with_suffix(".part").write_text(str(128 + number))
        stop.with_suffix(".part").rename(stop)
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
