"""Recipes in several processes, forked with torch already imported so that they start fast."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mytune.modules import LinearCrossEntropyLoss
from tests.recipes.conftest import metrics_of, recipe_of

SHARES_4_BITS = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="this torch cannot share 4-bit weights among ranks"
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # the first step of an optimizer imports it
        "matplotlib.figure",
        "mytune.cli.run",
        "mytune.datasets.builders",
        "mytune.models.auto",
        "mytune.training.checkpointing.checkpointers",
        "mytune.training.report",
        "mytune.training.sharding",
    ]
)


class StoppingLoss(LinearCrossEntropyLoss):
    """Asks rank 1 alone to stop as soon as it validates."""

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        if not torch.is_grad_enabled() and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(model, batch)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _work(rank: int, world_size: int, port: int, command: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in where.items()})
    import torch

    from mytune.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(command))


def run_ranks(
    config: dict[str, Any], folder: Path, *overrides: str, n: int = 2, code: int = 0
) -> list[dict[str, Any]]:
    """Run the fine-tuning recipe on `n` ranks; return the metrics by step."""
    file, log = folder / "ranks.yaml", folder / "ranks.log"
    file.write_text(yaml.safe_dump(config))
    log.unlink(missing_ok=True)
    command = ["run", recipe_of(config), "--config", str(file), *overrides]
    port = free_port()
    processes = [
        _CONTEXT.Process(target=_work, args=(rank, n, port, command, log), daemon=True)
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(180)  # compiling takes a while where cores are shared
            assert process.exitcode is not None, f"a rank hangs\n{log.read_text()}"
        assert {process.exitcode for process in processes} == {code}, log.read_text()
    finally:
        for process in processes:
            process.kill()
    return metrics_of(config, overrides)
