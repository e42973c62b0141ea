"""Gives the numbers of a run, from one place in the loop, to its logs, to Prometheus, and to TensorBoard where wished."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from job import checkpoint_names
from job.config import Config
from job.errors import UserError
from job.files import json_lines
from job.monitoring.device import Device, peak_flops
from job.monitoring.endpoint import Endpoint
from job.monitoring.environment import environment
from job.monitoring.exporter import Metrics
from job.monitoring.flops import Done, Work
from job.monitoring.goodput import Goodput
from job.monitoring.metrics import Series, evaluation_series, training_series
from job.monitoring.phases import Phases
from job.monitoring.training_log import JsonLines
from job.monitoring.vitals import Vitals

WRITE_SECONDS = 10.0  # between two writes of goodput.json
TWO_TERMS = {
    "l2t": ("base_l2t_text",),
    "t2l": ("base_t2l_latent",),
    "unconditional": ("text", "latent"),
    "cycle_vae": ("base_l2t_text", "base_t2l_latent"),
}


class Place(Protocol):
    """Which process this is."""

    @property
    def rank(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def job_id(self) -> str: ...


class Saves(Protocol):
    """What the checkpointer counts."""

    saves: int
    failures: int
    last_save_seconds: float
    last_stall_seconds: float
    bytes: int


class Reporter:
    """Owns everything that shows a run to the outside, on every rank. Its methods are the loop's to call, and wait for no one.

    `silence` gives the seconds since the rank last came forward, `gather` every rank's value of something, `dtype` is what matrix
    products are computed in, `started` when the process was.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        process: Place,
        phases: Phases,
        work: Work,
        *,
        dtype: torch.dtype,
        saves: Saves,
        silence: Callable[[], float],
        gather: Callable[[Any], list[Any]],
        started: float,
    ) -> None:
        c = config.monitoring
        self.config, self.run_dir, self.phases, self.work, self.saves, self.main = (
            config,
            run_dir,
            phases,
            work,
            saves,
            process.rank == 0,
        )
        self.log, self.evaluations = JsonLines(run_dir / "training_log.jsonl"), JsonLines(run_dir / "evaluation.jsonl")
        self.vitals = Vitals(silence, c.stalled_after_seconds, started)
        self.peak_flops = 1e12 * c.peak_tflops if c.peak_tflops else peak_flops(process.device, dtype)
        self.all_flops = process.world_size * self.peak_flops
        self.metrics = Metrics(run_label(run_dir, Path(config.logging.save_dir)), process.rank, self._live)
        self.goodput, self._written, self._started = Goodput.of(run_dir / "goodput.json"), 0.0, started
        self.metrics.set(constants(config, process, dtype) | {("cyclevae_device_peak_flops", ()): self.peak_flops})
        self._device, self._busy = Device(process.device), 0.0
        self._counted = self._done = 0  # steps: in the counters, and done
        self.device_values: dict[str, float] = {}
        self._observe()
        self._tensorboard: Any = None
        self._endpoint = Endpoint(
            config, self.metrics, self.vitals, process.local_rank, process.job_id, gather, self._observe
        )

    def begin(self, step: int, evaluated: int) -> None:
        """The loop begins at `step`, last evaluated at `evaluated`: what a killed run logged beyond is dropped."""
        if self.main:
            logged = [
                int(line["step"]) for line in json_lines(self.log.path)[-1:]
            ]  # newer than goodput.json when the run was killed
            self.goodput.furthest = max([self.goodput.furthest, *logged])
            self.log.continue_from(step)
            self.evaluations.continue_from(step if evaluated == step else step - 1)
            last = json_lines(self.evaluations.path)[-1:]
            self.metrics.set({evaluation_series(name): value for line in last for name, value in line.items()})
        if self.main and self.config.monitoring.tensorboard:
            self._tensorboard = tensorboard_writer(self.run_dir / "tensorboard", step + 1)
        self._counted = self._done = step
        self.goodput.starts += 1
        self.goodput.seconds["starting"] += time.time() - self._started
        self.metrics.set({("cyclevae_step", ()): step, **self.goodput.series()})
        self._write_goodput()
        self.vitals.training = True

    def step_ended(self) -> None:
        """A step is done; with it its time goes into the histogram."""
        busy = self.phases.total["step"] + self.phases.total["data_wait"]
        self.metrics.step_duration.observe(busy - self._busy)
        self._busy = busy
        self._done += 1
        self.vitals.step_ended()

    def interval(self, values: dict[str, float], seconds: Mapping[str, float], work: Done) -> None:
        """A log interval: its values for the logs, the seconds of the loop's phases and the work in it."""
        self.vitals.usual_step(values["step_seconds"])
        self._count(seconds, work)
        found = {series: value for name, value in values.items() if (series := training_series(name))}
        expected = expected_save_interval(self.config, values["step_seconds"])
        self.metrics.set(
            {
                **found,
                **self.goodput.series(),
                ("cyclevae_progress_ratio", ()): self._done / self.config.training.num_train_steps,
                **({("cyclevae_checkpoint_expected_interval_seconds", ()): expected} if expected else {}),
            }
        )
        if self.main:
            self.log.write(values)
            self._to_tensorboard(values)
        if time.monotonic() - self._written > WRITE_SECONDS:
            self._write_goodput()

    def evaluation(self, done: int, values: Mapping[str, float]) -> None:
        """What an evaluation after `done` steps found."""
        line = {"step": done, **values}
        self.metrics.set({evaluation_series(name): value for name, value in line.items()})
        if self.main:
            self.evaluations.write(line)
            self._to_tensorboard(line)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        """The run ends, for now: take back what announced it."""
        self.vitals.training = False
        self._count(self.phases.read(), self.work.read())
        self._write_goodput()
        self._endpoint.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _count(self, seconds: Mapping[str, float], work: Done) -> None:
        self.goodput.steps_done(self._counted, self._done, work)
        self.goodput.time_spent(self._counted, self._done, seconds)
        self._counted = self._done

    def _to_tensorboard(self, values: Mapping[str, float]) -> None:
        if self._tensorboard is not None:
            for name in values.keys() - {"step"}:
                self._tensorboard.add_scalar(name.replace("@", "_t"), values[name], values["step"])

    def _write_goodput(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # what a full disk refuses is written with a later one
            if self.main:
                self.goodput.write(self.run_dir / "goodput.json")

    def _live(self) -> dict[Series, float]:
        """In the thread of a scrape: reads plain numbers that the loop and the checkpointer write."""
        s = self.saves
        values: dict[str, float] = {"saves_total": s.saves, "failures_total": s.failures}
        if s.saves:
            values |= {
                "duration_seconds": s.last_save_seconds,
                "stall_seconds": s.last_stall_seconds,
                "share_bytes": s.bytes,
            }
        return {
            **self.vitals.series(),
            **{(f"cyclevae_checkpoint_{name}", ()): value for name, value in values.items()},
        }

    def _observe(self) -> None:
        """In the monitoring thread: the device, and the newest checkpoint on disk."""
        self.device_values = self._device.read()
        found: dict[Series, float] = {
            series: value for name, value in self.device_values.items() if (series := training_series(name))
        }
        self.metrics.observe(found | (newest_checkpoint(self.run_dir / "checkpoints") if self.main else {}))


def run_label(run_dir: Path, save_dir: Path) -> str:
    """What the label `run` says: the run's directory below save_dir, so that the points of a sweep differ."""
    run_dir, save_dir = run_dir.resolve(), save_dir.resolve()
    return str(run_dir.relative_to(save_dir)) if save_dir in run_dir.parents else run_dir.name


def newest_checkpoint(directory: Path) -> dict[Series, float]:
    """Step, time and size of the newest committed checkpoint."""
    steps = checkpoint_names.steps(directory)
    if not steps:
        return {}
    newest = directory / checkpoint_names.directory_name(steps[-1])
    try:
        size = sum(file.stat().st_size for file in newest.iterdir())
        committed = (newest / checkpoint_names.COMMIT_FILE).stat().st_mtime
    except FileNotFoundError:  # replaced by a newer one meanwhile
        return {}
    return {
        ("cyclevae_checkpoint_step", ()): steps[-1],
        ("cyclevae_checkpoint_size_bytes", ()): size,
        ("cyclevae_checkpoint_last_success_timestamp_seconds", ()): committed,
    }


def expected_save_interval(config: Config, step_seconds: float) -> float | None:
    """Seconds between checkpoints at this step time; None when they come only at the end."""
    c = config.logging
    intervals = [
        *([c.save_freq * step_seconds] if c.save_freq else []),
        *([60 * c.save_minutes] if c.save_minutes else []),
    ]
    return min(intervals, default=None)


def constants(config: Config, process: Place, dtype: torch.dtype) -> dict[Series, float]:
    """What does not change while a run trains."""
    loss, made = config.loss, environment(process.device, process.world_size)
    build = (
        made["version"],
        made["git_commit"] or "",
        made["packages"]["torch"],
        made["packages"]["mmdit"],
        made["python"],
        made["built"] or "",
    )
    words = (
        loss.loss_type,
        config.model.latent_parameterization,
        loss.latent_t_mode,
        config.model.implementation,
        str(dtype).removeprefix("torch."),
        made["gpu"] or "cpu",
        str(process.world_size),
    )
    weights = {
        term: loss.latent_loss_weight if "latent" in term else 1.0
        for term in TWO_TERMS.get(loss.loss_type, ("base_l2t_text", "base_t2l_latent", "text", "latent"))
    }
    values: dict[Series, float] = {
        ("cyclevae_build_info", build): 1,
        ("cyclevae_config_info", words): 1,
        ("cyclevae_target_steps", ()): config.training.num_train_steps,
    }
    values |= {("cyclevae_loss_weight", (term,)): weight for term, weight in weights.items()}
    values |= {("cyclevae_loss_weight_target", (term,)): weight for term, weight in weights.items()}
    if loss.loss_type == "cycle_vae":
        for term, target, end in (
            ("cycle_text", loss.cycle_text_weight, loss.cycle_text_warmup_steps + loss.cycle_text_ramp_steps),
            ("cycle_latent", loss.cycle_latent_weight, loss.cycle_latent_warmup_steps + loss.cycle_latent_ramp_steps),
        ):
            values |= {
                ("cyclevae_loss_weight_target", (term,)): target,
                ("cyclevae_loss_weight_target_step", (term,)): end,
            }
    return values


def tensorboard_writer(directory: Path, first_step: int) -> Any:
    """TensorBoard's writer; points from `first_step` on that a killed run wrote are dropped. Raises UserError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "monitoring.tensorboard=true needs TensorBoard; run `pip install cyclevae[tensorboard]`"
        ) from error
    return SummaryWriter(str(directory), purge_step=first_step)
