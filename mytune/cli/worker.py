"""One process of a run under torchrun: `python -m mytune.cli.worker RECIPE --config ...`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

FOLDER = "MYTUNE_WORKERS"  # environment variable: where workers leave their pid and their outcome
_STOPPED = 75


def main() -> int:
    """Run the recipe and leave its exit code and message where the launcher finds them."""
    from mytune.cli.report import outcome
    from mytune.cli.run import execute, load, parse

    folder = Path(os.environ.pop(FOLDER))
    del os.environ["PYTHONSAFEPATH"]  # was for this process alone
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (folder / f"{os.getpid()}.pid").touch()
    threading.Thread(target=_watch, args=(folder, attempt, os.getppid()), daemon=True).start()

    def work() -> int:
        job = parse(sys.argv[1:])
        return execute(job, load(job, components=False))  # the launcher has checked the components

    code, text = outcome(work)
    part = folder / f"{attempt}-{os.environ['RANK']}.part"
    found = {"attempt": attempt, "code": code, "text": text, "time": time.time()}
    part.write_text(json.dumps(found))
    part.rename(part.with_suffix(".json"))
    # torchrun ends all ranks as soon as one fails; in a run that stops early each takes its time.
    return 0 if code == _STOPPED else code


def first_failure(folder: Path, attempt: int | None = None) -> tuple[int, str]:
    """Return exit code and message of the rank that failed first; (0, "") if none has.

    Only one attempt counts, the last by default: torchrun's --max-restarts begins new ones.
    """
    outcomes = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    if attempt is None:
        attempt = max((each["attempt"] for each in outcomes), default=0)
    failed = [each for each in outcomes if each["attempt"] == attempt and each["code"]]
    if not failed:
        return 0, ""
    first = min(failed, key=lambda each: float(each["time"]))
    return first["code"], first["text"]


def _watch(folder: Path, attempt: int, launcher: int) -> None:
    """End this process when the launcher is gone or, a little later, another rank has failed.

    The first would leave orphans; after the second this rank might wait in a collective for ever.
    """
    while os.getppid() == launcher:
        time.sleep(1)
        if first_failure(folder, attempt)[0] not in (0, _STOPPED):
            time.sleep(10)
            break
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
