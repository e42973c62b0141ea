"""What a run directory tells about its run: written by the trainer, and by the batch step in slurm/."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from job.errors import UserError
from job.files import json_lines
from job.launch.slurm import scheduler

ALIVE_SECONDS = 90.0  # the batch step renews slurm/alive every 20 s; a network file system shows it later
COLLATERAL = re.compile(r"lost another rank|gave up|Exited with exit code|Job step aborted|could not join the run")
FAILURE = re.compile(
    r"^(\d+: )?(error: |[\w.]+(Error|Exception|Interrupt)\b|Fatal Python error|srun: error: |slurmstepd: error: )"
)


@dataclass(frozen=True)
class RunDirectory:
    """A run directory, of a run that SLURM has or had a job for."""

    path: Path

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """UserError for a directory in which SLURM has not run."""
        if not (path / "slurm").is_dir():
            raise UserError(f"{path} is no run that was submitted to SLURM: `cyclevae slurm list DIRECTORY` finds them")
        return cls(path)

    @cached_property
    def submission(self) -> dict[str, Any]:
        """What `submit` wrote: job, command that submits it again, index in its array, time; empty for sbatch slurm/train.sbatch."""
        path = self.path / "slurm" / "submission.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What the batch steps noted."""
        return json_lines(self.path / "slurm" / "events.jsonl")

    @property
    def job(self) -> str:
        """Id of the latest job; empty without one."""
        told = [*self.events[-1:], *([self.submission] if self.submission else [])]
        return str(max(told, key=lambda one: float(one["time"]))["job"]) if told else ""

    def log(self, job: str | None = None) -> Path:
        """The output of all ranks of a job, over all its restarts."""
        return self.path / "slurm" / f"{job or self.job}.log"

    def outcome(self, job: str) -> str:
        """How a job that left the queue ended: COMPLETED, FAILED (exit code 1), ..."""
        never: dict[str, Any] = {"event": "never started", "exit_code": None}
        last = next((event for event in reversed(self.events) if event["job"] == job), never)
        # The run's own word first: accounting comes late, or not at all, and may still tell of an earlier start.
        told = {"finished": "COMPLETED", "failed": "FAILED"}.get(last["event"])
        state, code = (
            (told, "") if told else scheduler.ended([job]).get(job, (f"ended without a word ({last['event']})", ""))
        )
        if state == "COMPLETED":
            return state
        return f"{state} (exit code {code if last['exit_code'] is None else last['exit_code']})"

    def first_failure(self, job: str) -> str | None:
        """What the first failing rank said in the job's last start, not what the others said of losing it."""
        path = self.log(job)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        starts = [number for number, line in enumerate(lines) if re.match(r"slurm: .*: started", line)]
        said = [line for line in lines[starts[-1] if starts else 0 :] if FAILURE.match(line)]
        own = [line for line in said if not COLLATERAL.search(line)]
        return next(iter(own or said), None)

    def status(self, queued: dict[str, str]) -> dict[str, Any]:
        """Job, state, whether it is alive, step, loss, rate, seconds left, restarts, last reason."""
        last_event = self.events[-1] if self.events else {}
        lines = json_lines(self.path / "training_log.jsonl")
        values = lines[-1] if lines else {}
        config = self.path / "config.yaml"
        total = OmegaConf.load(config).training.num_train_steps if config.exists() else None
        step = int(values.get("step", 0))
        sign = self.path / "slurm" / "alive"
        alive = sign.exists() and time.time() - sign.stat().st_mtime < ALIVE_SECONDS
        return {
            "run": str(self.path),
            "job": self.job,
            "state": queued.get(self.job) or str(last_event.get("event", "submitted")).upper(),
            "alive": alive,
            "step": step,
            "steps": total,
            "loss": values.get("loss"),
            "tokens_per_second": values.get("tokens_per_second"),
            "seconds_left": round((total - step) * values["step_seconds"])
            if total and "step_seconds" in values
            else None,
            "restarts": last_event.get("restarts", 0),
            "reason": last_event.get("reason"),
            "log": str(self.log()),
        }


def find_runs(root: Path) -> list[RunDirectory]:
    """Every run directory below `root` that SLURM has or had a job for."""
    found = {path.parent.parent for name in ("submission.json", "events.jsonl") for path in root.rglob(f"slurm/{name}")}
    return [RunDirectory(path) for path in sorted(found)]
