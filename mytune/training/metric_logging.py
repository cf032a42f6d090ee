"""Metric loggers: where the numbers of a run go, to a file, the screen or a tracker.

All have the same methods and write on rank 0 only. Trackers are optional packages.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from torch import Tensor
from tqdm import tqdm

from mytune.config import redact
from mytune.errors import ConfigError, ResourceError
from mytune.training.disk import write_atomic, writing
from mytune.training.distributed import rank

log = logging.getLogger("mytune")

Scalar = Tensor | float


class MetricLogger:
    """What every metric logger can do. A kind of logger defines `_write` and what else it needs."""

    def log(self, name: str, value: Scalar, step: int) -> None:
        """Log one number."""
        self.log_dict({name: value}, step)

    def log_dict(self, payload: Mapping[str, Scalar], step: int) -> None:
        """Log numbers of one step, by name; an empty payload is not logged."""
        if rank() == 0 and payload:
            self._write({name: float(value) for name, value in payload.items()}, step)

    def log_config(self, config: str) -> None:
        """Keep the run's config, a YAML text; secrets are redacted."""
        if rank() == 0:
            self._write_config(redact(config))

    def resume_at(self, step: int) -> None:
        """Forget what was logged after `step`, where that is possible; 0 starts over."""

    def logged(self, step: int) -> set[str]:
        """Return the names of what was logged at a step, as far as that can be told."""
        return set()

    def close(self) -> None:
        """Finish writing."""

    def _write(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _write_config(self, config: str) -> None:
        pass


class MetricLoggers(MetricLogger):
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[MetricLogger]) -> None:
        self.loggers = list(loggers)

    @property
    def metrics_file(self) -> Path | None:
        """The file of the first DiskLogger."""
        return next((each.path for each in self.loggers if isinstance(each, DiskLogger)), None)

    def history(self, name: str) -> dict[int, float]:
        """Return a metric by step, as the first DiskLogger has it."""
        rows = read_metrics(self.metrics_file) if self.metrics_file else []
        return {row["step"]: row[name] for row in rows if isinstance(row.get(name), int | float)}

    def _write(self, values: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_dict(values, step)

    def log_config(self, config: str) -> None:
        for logger in self.loggers:
            logger.log_config(config)

    def resume_at(self, step: int) -> None:
        for logger in self.loggers:
            logger.resume_at(step)

    def logged(self, step: int) -> set[str]:
        return set[str]().union(*(logger.logged(step) for logger in self.loggers))

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class DiskLogger(MetricLogger):
    """Writes `log_dir/filename`: one JSON object per logged step, keyed by `step` and metric names.

    NaN and infinity become null. Each line is given to the system before training goes on.
    """

    def __init__(self, log_dir: str, filename: str = "metrics.jsonl") -> None:
        if Path(filename).name != filename or not filename.endswith(".jsonl"):
            raise ConfigError(
                f"metric_logger.filename is {filename!r}; it must be a name that ends in .jsonl, "
                "such as metrics.jsonl; log_dir says where"
            )
        self.path = Path(log_dir).expanduser() / filename
        if rank() == 0:
            with writing(self.path, "metric_logger.log_dir"):
                self.path.parent.mkdir(parents=True, exist_ok=True)

    def _write(self, values: dict[str, float], step: int) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        line = json.dumps({"step": step, **finite}) + "\n"
        with (
            writing(self.path, "metric_logger.log_dir"),
            open(self.path, "a", encoding="utf-8", opener=_no_link) as file,
        ):
            file.write(line)

    def _write_config(self, config: str) -> None:
        write_atomic(self.path.with_name("config.yaml"), config.encode())

    def resume_at(self, step: int) -> None:
        if rank() == 0 and self.path.exists():
            lines = self.path.read_bytes().splitlines()
            if any(_step(line) == math.inf for line in lines[:-1]):  # the last may be cut short
                raise ConfigError(
                    f"{self.path} holds something else than metrics, which would be lost; "
                    "change metric_logger.log_dir or filename"
                )
            kept = [line for line in lines if _step(line) <= step]
            if step == 0 and lines:
                self._set_aside()
            else:
                write_atomic(self.path, b"".join(line + b"\n" for line in kept))

    def _set_aside(self) -> None:
        """Keep the metrics, and the config, of a run that this one does not go on from."""
        name = uuid4().hex
        for path in (self.path, self.path.with_name("config.yaml")):
            if path.exists():
                aside = path.with_name(f"{path.stem}.kept-{name}{path.suffix}")
                path.rename(aside)
                log.warning("%s was there before: it is now %s", path, aside.name)

    def logged(self, step: int) -> set[str]:
        rows = read_metrics(self.path) if rank() == 0 else []
        return {name for row in rows if row["step"] == step for name in row}


def _no_link(path: str, flags: int) -> int:
    """Open a file that is no link: one in a folder from elsewhere could lead to any file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def _step(line: bytes) -> float:
    """Return a line's step; a line cut short by a kill counts as after all steps."""
    with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return int(json.loads(line)["step"])
    return math.inf


class StdoutLogger(MetricLogger):
    """Prints one line per logged step."""

    def _write(self, values: dict[str, float], step: int) -> None:
        tqdm.write(f"step {step} | {' '.join(f'{name}:{v:.6g}' for name, v in values.items())}")


class TensorBoardLogger(MetricLogger):
    """Writes TensorBoard events into `log_dir`; a resumed run continues its curves there."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = os.path.expanduser(log_dir)
        _tracker("tensorboard")
        self._first_step: int | None = None

    @cached_property
    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.log_dir, purge_step=self._first_step)  # type: ignore[no-untyped-call]

    def _write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def _write_config(self, config: str) -> None:
        self._writer.add_text("config", f"```yaml\n{config}\n```")

    def resume_at(self, step: int) -> None:
        self._first_step = step + 1

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


class WandBLogger(MetricLogger):
    """Logs to Weights & Biases; further arguments go to `wandb.init`.

    Steps are the metric `global_step`. To continue a run on resume give `id` and `resume: allow`.
    """

    def __init__(
        self,
        project: str = "mytune",
        entity: str | None = None,
        group: str | None = None,
        log_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        wandb = _tracker("wandb")
        self._run: Any = None
        if rank() == 0:
            with _starting("wandb", "log in with `wandb login`, or set WANDB_MODE=offline"):
                if log_dir:
                    log_dir = os.path.expanduser(log_dir)
                    Path(log_dir).mkdir(parents=True, exist_ok=True)
                self._run = wandb.init(
                    project=project, entity=entity, group=group, dir=log_dir, **kwargs
                )
                self._run.define_metric("*", step_metric="global_step")

    def _write(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "global_step": step})

    def _write_config(self, config: str) -> None:
        self._run.config.update(yaml.safe_load(config), allow_val_change=True)

    def close(self) -> None:
        if self._run:
            self._run.finish()


class CometLogger(MetricLogger):
    """Logs to Comet; further arguments (workspace, project, online, ...) go to `comet_ml.start`.

    The key is best left to COMET_API_KEY or `comet login`. Code is uploaded only with `log_code`.
    """

    def __init__(
        self,
        experiment_name: str | None = None,
        tags: list[str] | None = None,
        log_code: bool = False,
        **kwargs: Any,
    ) -> None:
        comet = _tracker("comet_ml")
        self._experiment: Any = None
        if rank() == 0:
            with _starting("comet", "set COMET_API_KEY, or pass online: false"):
                config = comet.ExperimentConfig(name=experiment_name, tags=tags, log_code=log_code)
                self._experiment = comet.start(experiment_config=config, **kwargs)

    def _write(self, values: dict[str, float], step: int) -> None:
        self._experiment.log_metrics(values, step=step)

    def _write_config(self, config: str) -> None:
        self._experiment.log_asset_data(config, name="config.yaml")

    def close(self) -> None:
        if self._experiment:
            self._experiment.end()


class MLFlowLogger(MetricLogger):
    """Logs to MLflow, at `tracking_uri` or MLFLOW_TRACKING_URI; `run_id` continues a run."""

    def __init__(
        self,
        experiment_name: str | None = None,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        run_name: str | None = None,
    ) -> None:
        self._mlflow = _tracker("mlflow")
        if rank() == 0:
            with _starting("mlflow", "check tracking_uri or MLFLOW_TRACKING_URI"):
                if tracking_uri:
                    self._mlflow.set_tracking_uri(tracking_uri)
                if experiment_name:
                    self._mlflow.set_experiment(experiment_name)
                self._mlflow.start_run(run_id=run_id, run_name=run_name)

    def _write(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step)

    def _write_config(self, config: str) -> None:
        self._mlflow.log_text(config, "config.yaml")

    def close(self) -> None:
        if rank() == 0:
            self._mlflow.end_run()


def _tracker(module: str) -> Any:
    """Import an optional package.

    Raises:
        ResourceError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ResourceError(
            f"metric_logger needs the package {module}, which is not installed ({error}); "
            f"run: pip install {module}"
        ) from error


@contextmanager
def _starting(tracker: str, remedy: str) -> Iterator[None]:
    """Turn whatever a tracker raises at its start into an error with a remedy."""
    try:
        yield
    except Exception as error:
        raise ResourceError(f"metric_logger: {tracker} did not start: {error}; {remedy}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a DiskLogger's file; none if there is no such file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    return [json.loads(line) for line in lines if _step(line) < math.inf]
