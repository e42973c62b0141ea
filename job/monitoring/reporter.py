"""Gives what a run has to tell, from one place in the loop, to its logs, to Prometheus, and to its trackers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from job.config import Config
from job.files import json_lines
from job.metric_names import Series, evaluation_series, training_series
from job.monitoring.device import Device, peak_flops
from job.monitoring.endpoint import Endpoint
from job.monitoring.exporter import Metrics
from job.monitoring.flops import Done, Work
from job.monitoring.goodput import WRITE_SECONDS, Goodput, Times
from job.monitoring.phases import Phases
from job.monitoring.run_facts import ThisProcess, run_facts, run_label
from job.monitoring.saves import SaveCounts, expected_save_interval, newest_checkpoint, save_series
from job.monitoring.trackers import Sample, Trackers
from job.monitoring.training_log import JsonLines
from job.monitoring.vitals import Vitals

SAMPLES = "samples.jsonl"  # of the run directory


class Reporter:
    """Owns what shows a run to the outside, on every rank. Its methods are called by the loop and wait for no one.

    The loop's thread hands over what it knows at the end of a step, a log interval and an evaluation. The monitoring
    thread adds every few seconds what takes longer to find out (`_observe`), and the thread of a scrape what must be
    of that moment (`_live`).

    `silence` gives the seconds since the rank last made progress, `gather` every rank's value of something, `dtype`
    is what matrix products are computed in, `times` when this start began.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        process: ThisProcess,
        phases: Phases,
        work: Work,
        *,
        dtype: torch.dtype,
        saves: SaveCounts,
        silence: Callable[[], float],
        gather: Callable[[Any], list[Any]],
        times: Times,
    ) -> None:
        c = config.monitoring
        self.config, self.run_dir = config, run_dir
        self.phases, self.work, self.saves = phases, work, saves
        self.main = process.rank == 0
        self._times = times

        self.log = JsonLines(run_dir / "training_log.jsonl")
        self.evaluations = JsonLines(run_dir / "evaluation.jsonl")
        self.samples_log = JsonLines(run_dir / SAMPLES)
        self._trackers: Trackers | None = None
        self.goodput = Goodput.of(run_dir / "goodput.json")
        self._goodput_written = 0.0
        self._counted = self._done = 0  # steps that are in the counters, and steps done
        self._busy = 0.0  # seconds of steps and waits that are in the histogram

        self.peak_flops = 1e12 * c.peak_tflops if c.peak_tflops else peak_flops(process.device, dtype)
        self.all_flops = process.world_size * self.peak_flops
        self.vitals = Vitals(silence, c.stalled_after_seconds, times.process_started)
        self.label = run_label(run_dir, Path(config.logging.save_dir))
        self.metrics = Metrics(self.label, process.rank, self._live)
        self.metrics.set({**run_facts(config, process, dtype), ("cyclevae_device_peak_flops", ()): self.peak_flops})
        self._device = Device(process.device)
        self.device_values: dict[str, float] = {}
        self._observe()
        self._endpoint = Endpoint(
            config, self.metrics, self.vitals, process.local_rank, process.job_id, gather, self._observe
        )

    def begin(self, step: int, evaluated: int, sampled: int = -1) -> None:
        """The loop begins at `step`, last evaluated at `evaluated` and sampled at `sampled`.

        What a killed run logged beyond is dropped.
        """
        if self.main:
            self._trackers = Trackers(self.config, self.run_dir, self.label, step + 1)
            self._continue_logs(step, evaluated, sampled)
        self._counted = self._done = step
        self.goodput.begin(self._times, time.time())
        self.metrics.set({("cyclevae_step", ()): step, **self.goodput.series()})
        self._write_goodput()
        self.vitals.training = True

    def _continue_logs(self, step: int, evaluated: int, sampled: int) -> None:
        # Before lines are dropped: the last one may be of a later step than goodput.json, which is written less
        # often. The steps up to it were done once already and will count as replayed.
        last_logged = [int(line["step"]) for line in json_lines(self.log.path)[-1:]]
        self.goodput.furthest = max([self.goodput.furthest, *last_logged])
        self.log.continue_from(step)
        # An evaluation at the checkpoint's own step stays only if the checkpoint knows of it; else it is made again.
        self.evaluations.continue_from(step if evaluated == step else step - 1)
        self.samples_log.continue_from(step if sampled == step else step - 1)
        for line in json_lines(self.evaluations.path)[-1:]:
            self._show_evaluation(line)

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
        shown = training_values(values) | self.goodput.series()
        shown["cyclevae_progress_ratio", ()] = self._done / self.config.training.num_train_steps
        expected = expected_save_interval(self.config.logging, values["step_seconds"])
        if expected is not None:
            shown["cyclevae_checkpoint_expected_interval_seconds", ()] = expected
        self.metrics.set(shown)
        if self.main:
            self.log.write(values)
        if self._trackers is not None:
            self._trackers.numbers(values)
        if time.monotonic() - self._goodput_written > WRITE_SECONDS:
            self._write_goodput()

    def evaluation(self, done: int, values: Mapping[str, float]) -> None:
        """What an evaluation after `done` steps found."""
        line = {"step": done, **values}
        self._show_evaluation(line)
        if self.main:
            self.evaluations.write(line)
        if self._trackers is not None:
            self._trackers.numbers(line)

    def samples(self, done: int, samples: Sequence[Sample]) -> None:
        """Round trips after `done` steps; rank 0 alone makes them."""
        self.samples_log.write({"step": done, "samples": samples})
        if self._trackers is not None:
            self._trackers.samples(done, samples)

    def count_time(self) -> None:
        """Account for all time until now in goodput.json."""
        self._count(self.phases.read(), self.work.read())
        self._write_goodput()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        """The run ends, for now: take back what announced it."""
        self.vitals.training = False
        self.count_time()
        if self._done >= self.config.training.num_train_steps:
            self.goodput.counted_until = 0.0  # finished: should it be trained further one day, it has not waited
            self._write_goodput()
        self._endpoint.close()
        if self._trackers is not None:
            self._trackers.close(finished=self._done >= self.config.training.num_train_steps)

    def _count(self, seconds: Mapping[str, float], work: Done) -> None:
        self.goodput.add_interval(self._counted, self._done, work, seconds)
        self.goodput.count_until(time.time())
        self._counted = self._done

    def _show_evaluation(self, line: Mapping[str, float]) -> None:
        self.metrics.set({evaluation_series(key): value for key, value in line.items()})

    def _write_goodput(self) -> None:
        self._goodput_written = time.monotonic()
        with contextlib.suppress(OSError):  # what a full disk refuses is written with a later one
            if self.main:
                self.goodput.write(self.run_dir / "goodput.json")

    def _live(self) -> dict[Series, float]:
        """In the thread of a scrape: reads plain numbers that the loop and the checkpointer write."""
        return self.vitals.series() | save_series(self.saves)

    def _observe(self) -> None:
        """In the monitoring thread: the device, and the newest checkpoint on disk."""
        self.device_values = self._device.read()
        observed = training_values(self.device_values)
        if self.main:
            observed |= newest_checkpoint(self.run_dir / "checkpoints")
        self.metrics.observe(observed)


def training_values(values: Mapping[str, float]) -> dict[Series, float]:
    """Numbers of the training log as series, without those that a histogram shows."""
    return {series: value for key, value in values.items() if (series := training_series(key))}
