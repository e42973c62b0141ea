"""What else shows the numbers and samples of a run, where the configuration asks for it: TensorBoard, Weights & Biases,
MLflow.

All of them are optional packages. A run that asks for one that is missing is refused before it trains. While it trains,
one that fails is left out from there on with a warning: the logs hold the same, and none of them may end a run.

Weights & Biases and MLflow know a run by an id. It is kept in RUN/trackers.json, so that a run which goes on from a
checkpoint goes on there, too. Steps that a kill took back come a second time then, with the same values.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from job.config import Config, get, keys, to_dict
from job.errors import UserError
from job.files import write_json

Sample = Mapping[str, str | None]  # an object of samples.jsonl: text, l2t, t2l2t
IDS = "trackers.json"  # of the run directory
PROJECT = "cyclevae"  # in Weights & Biases, unless WANDB_PROJECT names another, and MLflow's experiment
# Closing sends what is not sent yet. A scheduler waits some tens of seconds for a run that it stops, and then kills it.
CLOSE_SECONDS = 15.0


class Tracker(Protocol):
    """One of them, open for a run."""

    def numbers(self, values: Mapping[str, float]) -> None:
        """A line of training_log.jsonl or evaluation.jsonl."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """A line of samples.jsonl."""

    def close(self, finished: bool) -> None:
        """The run ends: for good, or to go on later."""


class TensorBoard:
    """Event files in RUN/tensorboard; points from `first_step` on that a killed run wrote are dropped."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def numbers(self, values: Mapping[str, float]) -> None:
        for name in values.keys() - {"step"}:
            self._writer.add_scalar(plain(name), values[name], values["step"])

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        # Four spaces make it preformatted: TensorBoard reads Markdown.
        lines = as_text(samples).splitlines()
        self._writer.add_text("samples", "\n".join(f"    {line}" for line in lines), step)

    def close(self, finished: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. Its own variables, such as WANDB_MODE=offline, say where it goes."""

    def __init__(self, run_dir: Path, name: str, config: Config) -> None:
        import wandb

        ids = read_ids(run_dir)
        # Written before anything is sent: a start that is killed in between must not begin a second run next time.
        run_id = ids.get("wandb") or uuid.uuid4().hex[:8]
        write_ids(run_dir, ids | {"wandb": run_id})
        self._table: Any = wandb.Table
        self._run: Any = wandb.init(
            project=wandb.setup().settings.project or PROJECT,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=to_dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Against the run's own steps. Those of wandb only count up: after a resume they would refuse the steps that
        # are done again.
        self._run.define_metric("*", step_metric="step")

    def numbers(self, values: Mapping[str, float]) -> None:
        self._run.log({plain(name): value for name, value in values.items()})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        columns = list(samples[0])
        rows = [[sample[column] for column in columns] for sample in samples]
        self._run.log({"step": step, "samples": self._table(columns=columns, data=rows)})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, below the experiment `cyclevae`. MLFLOW_TRACKING_URI says where; without it ./mlflow.db."""

    def __init__(self, run_dir: Path, name: str, config: Config) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric: Any = Metric
        self._client: Any = MlflowClient()
        self._sent: Any = None  # the newest numbers on their way
        ids = read_ids(run_dir)
        self._id = ids.get("mlflow", "")
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        self._id = self._client.create_run(experiment_id, run_name=name).info.run_id
        write_ids(run_dir, ids | {"mlflow": self._id})
        # Parameters cannot change later: of a run that goes on with other ones, MLflow keeps the first.
        params = [Param(key, str(get(config, key))[:500]) for key in keys()]
        self._client.log_batch(self._id, params=params)

    def numbers(self, values: Mapping[str, float]) -> None:
        now, step = int(1000 * time.time()), int(values["step"])
        metrics = [self._metric(plain(name), value, now, step) for name, value in values.items() if name != "step"]
        # From a thread of MLflow, in order: a server may be slow.
        self._sent = self._client.log_batch(self._id, metrics, synchronous=False)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._client.log_text(self._id, as_text(samples), f"samples/step_{step:08d}.txt")

    def close(self, finished: bool) -> None:
        if self._sent is not None:
            self._sent.wait()
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


# Key of the configuration, and the package that it needs with what pip calls it.
PACKAGES = {
    "monitoring.tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "logging.wandb": ("wandb", "wandb"),
    "logging.mlflow": ("mlflow.tracking", "mlflow"),
}


def wanted(config: Config) -> list[str]:
    """The keys of the trackers that a run asks for."""
    asked = {
        "monitoring.tensorboard": config.monitoring.tensorboard,
        "logging.wandb": config.logging.wandb,
        "logging.mlflow": config.logging.mlflow,
    }
    return [key for key, value in asked.items() if value]


def refuse_missing_packages(config: Config) -> None:
    """UserError for a tracker whose package is not installed."""
    for key in wanted(config):
        module, package = PACKAGES[key]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{key}=true needs {package}; run `pip install {package}`") from error


class Trackers:
    """All that a run asked for. Every method does its part with each of them, and none raises."""

    def __init__(self, config: Config, run_dir: Path, name: str, first_step: int) -> None:
        """Open them. UserError for one that cannot be opened, such as a server that refuses."""
        refuse_missing_packages(config)
        open_by_key: dict[str, Callable[[], Tracker]] = {
            "monitoring.tensorboard": lambda: TensorBoard(run_dir, first_step),
            "logging.wandb": lambda: WeightsAndBiases(run_dir, name, config),
            "logging.mlflow": lambda: MLflow(run_dir, name, config),
        }
        self._open = {key: opened(key, open_by_key[key]) for key in wanted(config)}

    def numbers(self, values: Mapping[str, float]) -> None:
        """A line of training_log.jsonl or evaluation.jsonl."""
        self._each(lambda tracker: tracker.numbers(values))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """A line of samples.jsonl."""
        self._each(lambda tracker: tracker.samples(step, samples))

    def close(self, finished: bool) -> None:
        """Close them, waiting CLOSE_SECONDS for each at most."""
        for key, tracker in self._open.items():
            thread = threading.Thread(target=closed, args=(key, tracker, finished), daemon=True, name=f"close {key}")
            thread.start()
            thread.join(CLOSE_SECONDS)
            if thread.is_alive():
                warn(key, f"did not take its last numbers within {CLOSE_SECONDS:.0f} s")
        self._open = {}

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for key, tracker in list(self._open.items()):
            try:
                tell(tracker)
            except Exception as error:  # whatever a foreign package raises
                del self._open[key]
                warn(key, f"left out from here on ({first_line(error)})")


def opened(key: str, open_it: Callable[[], Tracker]) -> Tracker:
    """A tracker, opened. UserError where that fails, whatever it raises."""
    try:
        return open_it()
    except Exception as error:
        raise UserError(f"{key}=true: {first_line(error)}; mend it or leave {key} out") from error


def closed(key: str, tracker: Tracker, finished: bool) -> None:
    """Close a tracker, with a warning where that fails."""
    try:
        tracker.close(finished)
    except Exception as error:
        warn(key, f"not closed ({first_line(error)})")


def warn(key: str, what: str) -> None:
    print(f"warning: {key}: {what}; the run's own logs hold the same", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """An error of a foreign package in one line."""
    return next(iter(str(error).splitlines()), "").rstrip(".") or type(error).__name__


def plain(name: str) -> str:
    """The key of a number as all of them take it: MLflow refuses @."""
    return name.replace("@", "_t")


def as_text(samples: Sequence[Sample]) -> str:
    """Samples as paragraphs, a line for each of their texts."""
    return "\n\n".join("\n".join(f"{kind:<6} {text}" for kind, text in sample.items()) for sample in samples)


def read_ids(run_dir: Path) -> dict[str, str]:
    """The ids of a run with its trackers; none where it has none yet."""
    with contextlib.suppress(OSError, ValueError):
        ids: dict[str, str] = json.loads((run_dir / IDS).read_text())
        return ids
    return {}


def write_ids(run_dir: Path, ids: Mapping[str, str]) -> None:
    """Keep the ids of a run with its trackers."""
    write_json(run_dir / IDS, dict(ids))
