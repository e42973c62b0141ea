"""What a run directory tells about its run: the trainer's files, and what the batch step keeps in slurm/."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from job.errors import UserError
from job.failure_records import read_failures
from job.files import by_number, json_lines
from job.launch.failures import end_of_log, first_cause
from job.launch.run_status import RunStatus
from job.launch.slurm import scheduler
from job.launch.slurm.scheduler import QueuedJob

ALIVE_SECONDS = 90.0  # the batch step renews slurm/alive every 20 s; a network file system shows it later
STATE_OF_EVENT = {"finished": "COMPLETED", "failed": "FAILED"}  # the last events of a run; all others are followed
# Why a job may wait for ever, where SLURM's word alone does not say it.
MEANINGS = {
    "BadConstraints": "no node is as the job asks",
    "PartitionConfig": "the partition, as it is now, has no nodes for a job of this size",
    "PartitionNodeLimit": "more nodes than the partition allows or has up",
    "PartitionTimeLimit": "a longer time limit than the partition's",
}
REFUSED = "refused"  # event of a job that found the run in another's hands: it says nothing of the run


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run that SLURM has or had a job for."""

    path: Path

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """UserError for a directory in which SLURM has not run."""
        if not (path / "slurm").is_dir():
            raise UserError(
                f"{path} is no run that was submitted to SLURM: `cyclevae slurm list DIRECTORY` finds them; a job of "
                "sbatch slurm/train.sbatch makes its run's directory when it starts"
            )
        return cls(path)

    @classmethod
    def chosen(cls, paths: Iterable[Path]) -> list[RunDirectory]:
        """The runs of directories, each of a run or of a sweep. UserError for one in which SLURM has not run."""
        runs: list[RunDirectory] = []
        for path in paths:
            below = [] if (path / "slurm").is_dir() else find_runs(path)
            runs += below or [cls.existing(path)]
        return runs

    @property
    def submission_file(self) -> Path:
        return self.path / "slurm" / "submission.json"

    @cached_property
    def submission(self) -> dict[str, Any]:
        """Last submission: job, command that submits it again, index in its array, folder of its script, time.

        Empty for a run of sbatch slurm/train.sbatch.
        """
        if not self.submission_file.exists():
            return {}
        submission: dict[str, Any] = _read(self.submission_file, lambda path: json.loads(path.read_text()))
        return submission

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What the batch steps of its jobs noted, oldest first."""
        return [event for event in self._all_events if event["event"] != REFUSED]

    @cached_property
    def _all_events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = _read(self.path / "slurm" / "events.jsonl", json_lines)
        return events

    @property
    def job(self) -> str:
        """Id of the latest job, whether it was started or only submitted; empty without one."""
        refused = {event["job"] for event in self._all_events if event["event"] == REFUSED}
        # A job is as old as its first event: one that was cancelled still notes its end after `resume` has submitted
        # the next one, and `wait` and `logs -f` would take it for the latest.
        mentions = [event for event in self.events if event["job"] == self.events[-1]["job"]][:1]
        if self.submission and self.submission["job"] not in refused:
            mentions.append(self.submission)
        if not mentions:
            return ""
        return str(max(mentions, key=lambda mention: float(mention["time"]))["job"])

    def log(self, job: str | None = None) -> Path:
        """The output of all ranks of a job, over all its restarts; before them, where what came first is printed."""
        job = job or self.job
        log = self.path / "slurm" / f"{job}.log"
        if not log.exists() and "folder" in self.submission:
            before = Path(self.submission["folder"]) / f"{job}_0_log.out"  # sbatch's own, of setup commands
            if before.exists():
                return before
        return log

    @property
    def is_finished(self) -> bool:
        """Whether the last word of its jobs is that it has done all its steps."""
        return bool(self.events) and self.events[-1]["event"] == "finished"

    @property
    def is_over(self) -> bool:
        """Whether its latest job has finished or failed; one that was only cancelled or stopped may go on."""
        last = self.last_event(self.job)
        return last is not None and last["event"] in STATE_OF_EVENT

    def last_event(self, job: str) -> dict[str, Any] | None:
        """What the batch step of a job noted last; None when it did not come as far as that."""
        return next((event for event in reversed(self.events) if event["job"] == job), None)

    def outcome(self, job: str) -> str:
        """How a job that left the queue ended: COMPLETED, FAILED (exit code 1), ...

        The run's own word counts first: accounting comes late, or not at all, and may still tell of an earlier start.
        """
        last = self.last_event(job) or {"event": "never started", "exit_code": None}
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
        # Failures are those of the last job that came as far as its ranks.
        started = self.last_event(job) is not None
        cause = first_cause(read_failures(self.path / "slurm" / "failures.jsonl")) if started else None
        if cause is not None:
            return str(cause)
        log = self.log(job)
        return end_of_log(log.read_text(errors="replace")) if log.exists() else None

    def is_unaccounted(self, queued: Mapping[str, QueuedJob]) -> bool:
        """Whether its job has left the queue without a word of how: accounting may know."""
        last = self.last_event(self.job)
        return self.job not in queued and (last is None or last["event"] not in STATE_OF_EVENT)

    def status(self, queued: Mapping[str, QueuedJob] | None, ended: Mapping[str, tuple[str, str]]) -> RunStatus:
        """What is known of the run.

        `queued` has the user's jobs in the queue (None: SLURM did not answer), `ended` what accounting says of jobs
        that have left it.
        """
        last_event = self.events[-1] if self.events else {}
        lines = _read(self.path / "training_log.jsonl", json_lines)
        logged = lines[-1] if lines else {}
        step, steps = int(logged.get("step", 0)), self._target_steps()
        seconds_left = None
        if steps and "step_seconds" in logged:
            seconds_left = round((steps - step) * logged["step_seconds"])
        state, reason = self._state(queued, ended)
        return RunStatus(
            run=str(self.path),
            job=self.job,
            state=state,
            alive=self._is_alive(),
            step=step,
            steps=steps,
            loss=logged.get("loss"),
            tokens_per_second=logged.get("tokens_per_second"),
            seconds_left=seconds_left,
            restarts=last_event.get("restarts", 0),
            reason=reason,
            log=str(self.log()),
            results=self._results(),
            node_hours=self._node_hours(),
            lost_ranks=self._lost_ranks(),
            excluded_nodes=self._excluded_nodes(),
        )

    def _results(self) -> dict[str, float] | None:
        """The last evaluation."""
        lines = _read(self.path / "evaluation.jsonl", json_lines)
        return {key: value for key, value in lines[-1].items() if key != "step"} if lines else None

    @cached_property
    def _nodes(self) -> list[dict[str, Any]]:
        """What the batch step noted of nodes that lost ranks (bad_nodes.sh), oldest first."""
        notes: list[dict[str, Any]] = _read(self.path / "slurm" / "nodes.jsonl", json_lines)
        return notes

    def _lost_ranks(self) -> dict[str, int] | None:
        """In how many starts each node has lost ranks; None where none has."""
        return dict(Counter(note["node"] for note in self._nodes if "node" in note)) or None

    def _excluded_nodes(self) -> list[str] | None:
        """The nodes on which the latest job will not start again, those that the user excluded among them."""
        lists = [note["excluded"] for note in self._nodes if "excluded" in note and note["job"] == self.job]
        return lists[-1] if lists else None

    def _node_hours(self) -> float | None:
        """Hours of nodes that the starts have taken, from each one's beginning to its end or, without, to now."""
        spent, began, nodes = 0.0, None, 0
        for event in self.events:
            if event["event"] == "started":
                began, nodes = event["time"], event.get("node_count") or 0
            elif began is not None:
                spent += nodes * (event["time"] - began)
                began = None
        if began is not None and self._is_alive():
            spent += nodes * (time.time() - began)
        return round(spent / 3600, 3) if self.events else None

    def _state(
        self, queued: Mapping[str, QueuedJob] | None, ended: Mapping[str, tuple[str, str]]
    ) -> tuple[str, str | None]:
        """The state of the run, and why."""
        job = self.job
        last = self.last_event(job)
        said = str(last["event"]).upper() if last else "SUBMITTED"
        reason = last["reason"] if last else None
        if queued is not None and job in queued:
            entry = queued[job]
            if entry.reason:  # why it waits now, and not what ended its last start
                expected = f", expected to start {entry.start}" if entry.start else ""
                meaning = f" ({MEANINGS[entry.reason]})" if entry.reason in MEANINGS else ""
                reason = f"{entry.reason}{meaning}{expected}"
            return entry.state, reason
        if last is not None and last["event"] in STATE_OF_EVENT:
            failure = self.first_failure(job) if last["event"] == "failed" else None
            return said, f"{reason}; {failure}" if failure else reason
        if queued is None or not job:
            return said, reason
        if job in ended:
            state, code = ended[job]
            failure = self.first_failure(job) if state != "CANCELLED" else None
            return state, "; ".join(part for part in (reason, f"exit code {code}", failure) if part)
        return "ENDED", "its job has left the queue, and accounting does not say how"

    def damage(self) -> RunStatus | None:
        """Instead of the status, where a file that it takes is damaged; None where none is."""
        try:
            self.status(None, {})
        except UserError as error:
            return RunStatus(
                str(self.path), "", "DAMAGED", self._is_alive(), 0, None, None, None, None, None, str(error), ""
            )
        return None

    def _target_steps(self) -> int | None:
        config = self.path / "config.yaml"
        steps = _read(config, lambda path: OmegaConf.load(path).training.num_train_steps) if config.exists() else None
        return None if steps is None else int(steps)

    def _is_alive(self) -> bool:
        sign = self.path / "slurm" / "alive"
        return sign.exists() and time.time() - sign.stat().st_mtime < ALIVE_SECONDS


def find_runs(root: Path) -> list[RunDirectory]:
    """Every run directory below `root` that SLURM has or had a job for, seed=2 before seed=10."""
    found = {path.parent.parent for name in ("submission.json", "events.jsonl") for path in root.rglob(f"slurm/{name}")}
    return [RunDirectory(path) for path in sorted(found, key=by_number)]


def statuses(runs: Sequence[RunDirectory], queued: Mapping[str, QueuedJob] | None) -> list[RunStatus]:
    """The status of every run; of one with a damaged file, which file that is."""
    damages = {run.path: run.damage() for run in runs}
    jobs = []
    if queued is not None:
        jobs = [run.job for run in runs if damages[run.path] is None and run.is_unaccounted(queued)]
    ended = scheduler.ended(job for job in jobs if job) if any(jobs) else {}
    return [damages[run.path] or run.status(queued, ended) for run in runs]


def _read(path: Path, parse: Callable[[Path], Any]) -> Any:
    """What `parse` makes of a file. UserError for whatever is wrong with it: a kill or a full disk may have cut it."""
    try:
        return parse(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
