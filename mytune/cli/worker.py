"""One process of a run under torchrun: `python -m mytune.cli.worker RECIPE --config ...`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

FOLDER = "MYTUNE_WORKERS"  # environment variable: the folder where workers leave their pid and their outcome
_STOPPED = 75


def main() -> int:
    """Run the recipe and leave code and message where the launcher finds them."""
    from mytune.cli.report import outcome
    from mytune.cli.run import execute, parse

    folder = Path(os.environ[FOLDER])
    (folder / f"{os.getpid()}.pid").touch()
    threading.Thread(target=_watch, args=(folder, os.getppid()), daemon=True).start()
    code, text = outcome(lambda: execute(parse(sys.argv[1:])))
    _leave(folder, code, text)
    # torchrun ends the others as soon as one fails; a run that stops early has to end on all ranks.
    return 0 if code == _STOPPED else code


def _leave(folder: Path, code: int, text: str) -> None:
    rank, attempt = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    found = {"attempt": attempt, "code": code, "text": text, "time": time.monotonic()}
    part = folder / f"{attempt}-{rank}.part"
    part.write_text(json.dumps(found))
    part.rename(part.with_suffix(".json"))


def _watch(folder: Path, launcher: int) -> None:
    """End this process when the launcher is gone or, a little later, another rank has failed.

    Otherwise the first leaves orphans, and after the second this rank may wait in a collective for ever.
    """
    from mytune.cli.torchrun import first_failure

    while os.getppid() == launcher:
        time.sleep(1)
        if first_failure(folder)[0] not in (0, _STOPPED):
            time.sleep(10)
            break
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
