"""hydra/launcher=slurm: the points of a sweep become SLURM jobs.

Each has a run directory that stays the same whenever it is submitted, so that the same command goes on where it ended.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from submitit.core.utils import FailedJobError

from job import checkpoint_names
from job.config import to_dict
from job.errors import JobError, UserError
from job.files import write_json
from job.launch.points import Point, points_of, refuse_batch_sizes, returns_of
from job.launch.slurm import scheduler
from job.launch.slurm.job_script import Executor, job_script, tasks_per_node
from job.launch.slurm.run_directory import RunDirectory
from job.launch.submission import SubmittedJob, submitted
from job.launch.waiting import FINISHED, Outcome, compare_runs, leave_jobs_on_signals, show_changes, summarize

POLL_SECONDS = 10.0


def launch(
    config: DictConfig, context: HydraContext, params: dict[str, Any], job_overrides: Sequence[Sequence[str]]
) -> list[JobReturn]:
    """What hydra/launcher=slurm does with a batch of points; `params` are the values of hydra.launcher.

    Points that are finished, or have a job in the queue, are not submitted again. UserError for what cannot be
    submitted, before anything is.
    """
    points = points_of(config, context, job_overrides)
    refuse_batch_sizes(points, [params["nodes"] or 1], tasks_per_node(params))
    at_once = scheduler.max_array_size() if scheduler.available() else len(points)
    if params["dry_run"]:
        for array in _split(points, at_once):
            executor, command = job_script(array, params)
            print(executor._make_submission_file_text(command, ""))
        return returns_of(job_overrides, points)
    jobs = busy(points)
    missing = [point for point in points if point not in jobs.values() and not is_finished(point)]
    for array in _split(missing, at_once):
        for job, point in zip(submit(array, params), array, strict=True):
            jobs[job] = point
            submitted.append(SubmittedJob(job, str(point.run_dir)))
            print(f"job {job}: {point.name}  ({point.run_dir})", flush=True)
    if params["wait"]:
        summarize(wait(jobs), [point.run_dir for point in points])
    return returns_of(job_overrides, points)


def _split(points: Sequence[Point], at_once: int) -> list[Sequence[Point]]:
    """The points in pieces of at most `at_once`."""
    return [points[start : start + at_once] for start in range(0, len(points), at_once)]


def busy(points: Sequence[Point]) -> dict[str, Point]:
    """The points that have a job in the queue, by its id: two jobs would write to one run directory.

    UserError when all have, as then the command cannot have been meant.
    """
    queued = scheduler.queued()
    jobs = {}
    for point in points:
        job = RunDirectory(point.run_dir).job
        # One that was cancelled and is saving (COMPLETING) is waited for by the next one's batch step.
        if queued.get(job, scheduler.COMPLETING) != scheduler.COMPLETING:
            jobs[job] = point
    if jobs and len(jobs) == len(points):
        job, point = next(iter(jobs.items()))
        raise UserError(
            f"{point.run_dir} is being trained by job {job}: `cyclevae slurm cancel {job}` first, "
            "or set another logging.run_name"
        )
    for job, point in jobs.items():
        print(f"job {job}: {point.name}  (in the queue already: {queued[job]})", flush=True)
    return jobs


def is_finished(point: Point) -> bool:
    """Whether a run has done all its steps with this very configuration, and says so.

    With another one it is submitted, and job.train tells what has changed.
    """
    run_dir, steps = point.run_dir, point.config.training.num_train_steps
    done = max(checkpoint_names.steps(run_dir / checkpoint_names.DIRECTORY), default=0)
    if done < steps or not (run_dir / "result.json").exists():
        return False
    config = run_dir / "config.yaml"
    if not config.exists() or config.read_text() != OmegaConf.to_yaml(to_dict(point.config)):
        return False
    print(f"finished already: {point.name}  ({run_dir})", flush=True)
    return True


def submit(points: Sequence[Point], params: dict[str, Any]) -> list[str]:
    """Hand a job array of at most MaxArraySize points to SLURM; returns their job ids."""
    executor, command = job_script(points, params)
    Path(executor.folder).mkdir(parents=True, exist_ok=True)
    try:
        job = executor._submit_command(command)
    except (FailedJobError, OSError) as error:
        raise UserError(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}") from error
    *sbatch, script = executor._make_submission_command(job.paths.submission_file)
    sbatch += ["--parsable", f"--chdir={os.getcwd()}"]
    if len(points) == 1:
        _note_submission(points[0], job.job_id, [*sbatch, script], None, executor)
        return [job.job_id]
    ids = [f"{job.job_id}_{index}" for index in range(len(points))]
    for index, point in enumerate(points):
        _note_submission(point, ids[index], [*sbatch, f"--array={index}", script], index, executor)
    return ids


def _note_submission(point: Point, job: str, again: Sequence[str], index: int | None, executor: Executor) -> None:
    """Write what `status` and `resume` need.

    The job, its index in the array, the command that submits it again, and the folder of the script's own output.
    """
    folder = str(Path(executor.folder).absolute())
    submission = {"job": job, "again": again, "index": index, "folder": folder, "time": time.time()}
    write_json(RunDirectory(point.run_dir).submission_file, submission)


def wait(jobs: Mapping[str, Point]) -> list[Outcome]:
    """Show the states of jobs until none is in the queue; returns how each ended. Signals end the waiting alone."""
    names = {job: point.name for job, point in jobs.items()}
    return _wait(names, {job: RunDirectory(point.run_dir) for job, point in jobs.items()})


def wait_for_runs(runs: Sequence[RunDirectory]) -> None:
    """Wait for runs that were submitted before, and print how they ended. UserError for one that never had a job."""
    for run in runs:
        if not run.job:
            raise UserError(f"{run.path} has no job")
    outcomes = _wait({run.job: run.path.name for run in runs}, {run.job: run for run in runs})
    summarize(outcomes, [run.path for run in runs])
    compare_runs()


def _wait(names: Mapping[str, str], runs: Mapping[str, RunDirectory]) -> list[Outcome]:
    leave_jobs_on_signals("cyclevae slurm")
    show_changes(names, _queue_until_over(names))
    return [_outcome(job, names[job], RunDirectory(run.path)) for job, run in runs.items()]


def _queue_until_over(jobs: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """States of the jobs in the queue, polled until none of `jobs` is there."""
    absent = 0
    while True:
        try:
            queued = scheduler.queued()
        except JobError as error:  # a controller that restarts
            print(f"warning: {error}; asking again", file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
            continue
        yield queued
        absent = 0 if queued.keys() & jobs.keys() else absent + 1
        if absent == 2:  # once may be a requeued job, which leaves the queue for a moment
            return
        time.sleep(min(POLL_SECONDS, 1.0 + len(jobs) / 10))


def _outcome(job: str, name: str, run: RunDirectory) -> Outcome:
    state = run.outcome(job)
    failure = run.first_failure(job) if state != FINISHED else None
    return Outcome(job, name, state, failure, str(run.log(job)))
