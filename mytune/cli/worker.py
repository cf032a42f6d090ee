"""One process of a run under torchrun: `python -m mytune.cli.worker RECIPE --config ...`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mytune.errors import RanksLost, StoppedEarly

# Environment variable: a folder with one for each attempt (torchrun's --max-restarts begins new
# ones), where each process leaves a file called as its pid and, when it ends, an outcome beside it.
FOLDER = "MYTUNE_WORKERS"
# A file in an attempt that was asked to stop: how processes of a later one end, at once.
STOP = "stop"


def main() -> int:
    """Run the recipe and leave its exit code and message where the launcher finds them."""
    from mytune.cli.report import open_streams, outcome, say
    from mytune.cli.run import execute, parse
    from mytune.config import load_config

    open_streams()
    mine = Path(os.environ.pop(FOLDER), os.environ["TORCHELASTIC_RESTART_COUNT"], str(os.getpid()))
    del os.environ["PYTHONSAFEPATH"]  # was for this process alone
    mine.parent.mkdir(exist_ok=True)
    mine.write_text(os.environ["RANK"])
    threading.Thread(target=_watch, args=(mine.parent, os.getppid()), daemon=True).start()

    lost, stopped = False, [int(file.read_text()) for file in mine.parents[1].glob(f"*/{STOP}")]
    if os.environ["RANK"] == "0" and (count := int(mine.parent.name)) and not stopped:
        before = first_failure(mine.parents[1] / str(count - 1))
        say(f"{before.text or 'a rank was killed'}\nstarting anew (restart {count})")

    def work() -> int:
        nonlocal lost
        if stopped:
            return stopped[0]
        job = parse(sys.argv[1:])
        # The launcher has checked the components.
        loaded = load_config(job.recipe, job.config, job.overrides, allow_components=job.allow)
        try:
            return execute(job, loaded)
        except RanksLost:
            lost = True
            raise

    code, text = outcome(work)
    part = mine.with_suffix(".part")
    part.write_text(json.dumps({"lost": lost, "time": time.time(), "code": code, "text": text}))
    part.rename(mine.with_suffix(".json"))
    # torchrun ends all ranks as soon as one fails; in a run that stops early each takes its time.
    return 0 if stopped or code == StoppedEarly.exit_code else code


def running(attempt: Path) -> list[int]:
    """Return the processes of an attempt that have begun and left no outcome."""
    return [
        int(file.name)
        for file in attempt.glob("[0-9]*")
        if file.name.isdecimal() and not file.with_suffix(".json").exists()
    ]


class Outcome(NamedTuple):
    """How a rank ended. In order: a failure of its own before one that only lost its peers."""

    lost: bool = False
    time: float = 0.0
    code: int = 0
    text: str = ""


def first_failure(attempt: Path) -> Outcome:
    """Return the outcome of the rank that failed first of its own; code 0 if none has failed."""
    outcomes = [Outcome(**json.loads(file.read_text())) for file in attempt.glob("*.json")]
    return min((each for each in outcomes if each.code), default=Outcome())


def silent_ranks(attempt: Path) -> list[int]:
    """Return the ranks that have left no outcome: they were killed, or hung."""
    return sorted(int((attempt / str(process)).read_text()) for process in running(attempt))


def _watch(attempt: Path, launcher: int) -> None:
    """End this process when the launcher is gone or, a little later, another rank has failed.

    The first would leave orphans; after the second this rank might wait in a collective for ever.
    """
    while os.getppid() == launcher:
        time.sleep(1)
        gone = not all(map(_exists, running(attempt)))
        if gone or first_failure(attempt).code not in (0, StoppedEarly.exit_code):
            time.sleep(5)
            break
    os._exit(1)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
