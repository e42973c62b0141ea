"""What a run directory tells about its run: the trainer's files, and what the batch step keeps in slurm/."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from job.errors import UserError
from job.failure_records import read_failures
from job.files import json_lines
from job.launch.failures import end_of_log, first_cause
from job.launch.run_status import RunStatus
from job.launch.slurm import scheduler

ALIVE_SECONDS = 90.0  # the batch step renews slurm/alive every 20 s; a network file system shows it later
STATE_OF_EVENT = {"finished": "COMPLETED", "failed": "FAILED"}  # the last events of a run; all others are followed


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run that SLURM has or had a job for."""

    path: Path

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """UserError for a directory in which SLURM has not run."""
        if not (path / "slurm").is_dir():
            raise UserError(f"{path} is no run that was submitted to SLURM: `cyclevae slurm list DIRECTORY` finds them")
        return cls(path)

    @property
    def submission_file(self) -> Path:
        return self.path / "slurm" / "submission.json"

    @cached_property
    def submission(self) -> dict[str, Any]:
        """Last submission: job, command that submits it again, index in its array, time.

        Empty for a run of sbatch slurm/train.sbatch.
        """
        return json.loads(self.submission_file.read_text()) if self.submission_file.exists() else {}

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What the batch steps noted, oldest first."""
        return json_lines(self.path / "slurm" / "events.jsonl")

    @property
    def job(self) -> str:
        """Id of the latest job, whether it was started or only submitted; empty without one."""
        mentions = [*self.events[-1:], *([self.submission] if self.submission else [])]
        if not mentions:
            return ""
        return str(max(mentions, key=lambda mention: float(mention["time"]))["job"])

    def log(self, job: str | None = None) -> Path:
        """The output of all ranks of a job, over all its restarts."""
        return self.path / "slurm" / f"{job or self.job}.log"

    def outcome(self, job: str) -> str:
        """How a job that left the queue ended: COMPLETED, FAILED (exit code 1), ...

        The run's own word counts first: accounting comes late, or not at all, and may still tell of an earlier start.
        """
        never: dict[str, Any] = {"event": "never started", "exit_code": None}
        last = next((event for event in reversed(self.events) if event["job"] == job), never)
        if last["event"] in STATE_OF_EVENT:
            state, code = STATE_OF_EVENT[last["event"]], ""
        else:
            unknown = (f"ended without a word ({last['event']})", "")
            state, code = scheduler.ended([job]).get(job, unknown)
        if state == "COMPLETED":
            return state
        return f"{state} (exit code {code if last['exit_code'] is None else last['exit_code']})"

    def first_failure(self, job: str) -> str | None:
        """Why a job's last start failed: the first rank's failure, not what the others said of losing it.

        The end of the log when no failure was recorded; None without a log.
        """
        cause = first_cause(read_failures(self.path / "slurm" / "failures.jsonl"))
        if cause is not None:
            return str(cause)
        log = self.log(job)
        return end_of_log(log.read_text(errors="replace")) if log.exists() else None

    def status(self, queued: Mapping[str, str]) -> RunStatus:
        """What is known of the run; `queued` has the states of the user's jobs in the queue."""
        last_event = self.events[-1] if self.events else {}
        lines = json_lines(self.path / "training_log.jsonl")
        logged = lines[-1] if lines else {}
        step, steps = int(logged.get("step", 0)), self._target_steps()
        seconds_left = None
        if steps and "step_seconds" in logged:
            seconds_left = round((steps - step) * logged["step_seconds"])
        return RunStatus(
            run=str(self.path),
            job=self.job,
            state=queued.get(self.job) or str(last_event.get("event", "submitted")).upper(),
            alive=self._is_alive(),
            step=step,
            steps=steps,
            loss=logged.get("loss"),
            tokens_per_second=logged.get("tokens_per_second"),
            seconds_left=seconds_left,
            restarts=last_event.get("restarts", 0),
            reason=last_event.get("reason"),
            log=str(self.log()),
        )

    def _target_steps(self) -> int | None:
        config = self.path / "config.yaml"
        return OmegaConf.load(config).training.num_train_steps if config.exists() else None

    def _is_alive(self) -> bool:
        sign = self.path / "slurm" / "alive"
        return sign.exists() and time.time() - sign.stat().st_mtime < ALIVE_SECONDS


def find_runs(root: Path) -> list[RunDirectory]:
    """Every run directory below `root` that SLURM has or had a job for."""
    found = {path.parent.parent for name in ("submission.json", "events.jsonl") for path in root.rglob(f"slurm/{name}")}
    return [RunDirectory(path) for path in sorted(found)]
