"""One process of a run under torchrun: `python -m mytune.cli.worker RECIPE --config ...`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

# Environment variable: a folder with one for each attempt (torchrun's --max-restarts begins new
# ones), where each process leaves a file called as its pid and, when it ends, an outcome beside it.
FOLDER = "MYTUNE_WORKERS"
_STOPPED = 75


def main() -> int:
    """Run the recipe and leave its exit code and message where the launcher finds them."""
    from mytune.cli.report import outcome
    from mytune.cli.run import execute, load, parse

    mine = Path(os.environ.pop(FOLDER), os.environ["TORCHELASTIC_RESTART_COUNT"], str(os.getpid()))
    del os.environ["PYTHONSAFEPATH"]  # was for this process alone
    mine.parent.mkdir(exist_ok=True)
    mine.touch()
    threading.Thread(target=_watch, args=(mine.parent, os.getppid()), daemon=True).start()

    def work() -> int:
        job = parse(sys.argv[1:])
        return execute(job, load(job, components=False))  # the launcher has checked the components

    code, text = outcome(work)
    part = mine.with_suffix(".part")
    part.write_text(json.dumps({"code": code, "text": text, "time": time.time()}))
    part.rename(mine.with_suffix(".json"))
    # torchrun ends all ranks as soon as one fails; in a run that stops early each takes its time.
    return 0 if code == _STOPPED else code


def running(attempt: Path) -> list[int]:
    """Return the processes of an attempt that have begun and left no outcome."""
    return [
        int(file.name)
        for file in attempt.glob("[0-9]*")
        if file.name.isdecimal() and not file.with_suffix(".json").exists()
    ]


def first_failure(attempt: Path) -> tuple[int, str]:
    """Return exit code and message of the rank that failed first; (0, "") if none has."""
    outcomes = [json.loads(file.read_text()) for file in attempt.glob("*.json")]
    failed = [each for each in outcomes if each["code"]]
    if not failed:
        return 0, ""
    first = min(failed, key=lambda each: float(each["time"]))
    return first["code"], first["text"]


def _watch(attempt: Path, launcher: int) -> None:
    """End this process when the launcher is gone or, a little later, another rank has failed.

    The first would leave orphans; after the second this rank might wait in a collective for ever.
    """
    while os.getppid() == launcher:
        time.sleep(1)
        gone = not all(map(_exists, running(attempt)))
        if gone or first_failure(attempt)[0] not in (0, _STOPPED):
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
