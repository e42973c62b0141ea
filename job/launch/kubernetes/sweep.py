"""hydra/launcher=kubernetes: the points of a sweep become TrainJobs or PyTorchJobs.

The same point again finds its own job by its name, and its run directory on the claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from job.config import DataConfig
from job.errors import JobError, UserError
from job.files import is_url
from job.launch.kubernetes.cluster import OURS, Cluster, Missing, Named
from job.launch.kubernetes.kinds import KINDS, OVER, TRAIN_JOB, Kind, annotation, kind_called, state
from job.launch.kubernetes.manifests import job_of, to_yaml
from job.launch.kubernetes.names import (
    DATA_MOUNT,
    DIGEST_ANNOTATION,
    METRICS_PORT,
    RUN_ANNOTATION,
    RUNS_MOUNT,
    WRITABLE_MOUNTS,
    Object,
    job_name,
)
from job.launch.kubernetes.pods import LaunchedRun
from job.launch.kubernetes.settings import ContainerSettings, Settings
from job.launch.kubernetes.status import first_failure, outcome
from job.launch.points import Point, points_of, refuse_batch_sizes, returns_of
from job.launch.submission import SubmittedJob, submitted
from job.launch.waiting import FINISHED, Outcome, leave_jobs_on_signals, show_changes, summarize


def launch(
    config: DictConfig, context: HydraContext, params: dict[str, Any], job_overrides: Sequence[Sequence[str]]
) -> list[JobReturn]:
    """What hydra/launcher=kubernetes does with a batch of points; `params` are the values of hydra.launcher.

    UserError for what cannot be sent, before anything is; JobError when a run failed.
    """
    points = points_of(config, context, job_overrides, Path("/"))
    settings = settings_of(params)
    runs = [run_of(point, Path("/", config.hydra.sweep.dir), settings) for point in points]
    refuse_batch_sizes(points, range(settings.min_nodes or settings.nodes, settings.nodes + 1), settings.tasks)
    kind = chosen_kind(settings, params)
    jobs = [job_of(kind, run, settings) for run in runs]
    if params["dry_run"]:
        print(to_yaml(jobs), end="")
        return returns_of(job_overrides, points)
    cluster = Cluster(params["namespace"], params["context"])
    if kind not in cluster.kinds:
        raise UserError(
            f"the cluster does not know {kind.name}s: install {kind.needs}, or set hydra.launcher.kind=auto; "
            "see docs: tutorials/sweep-on-kubernetes"
        )
    there = refuse(cluster, runs, jobs)
    cluster.refuse_missing(named_by(kind, settings))
    for run, job in zip(runs, jobs, strict=True):
        words = send(cluster, job, there.get(run.name))
        submitted.append(SubmittedJob(run.name, run.directory))
        print(f"job {run.name}: {words}{run.overrides}  ({run.directory})", flush=True)
    if params["wait"]:
        outcomes = wait(cluster, kind, {run.name: run.overrides for run in runs})
        summarize(outcomes, [point.run_dir for point in points])
    return returns_of(job_overrides, points)


def chosen_kind(settings: Settings, params: Mapping[str, Any]) -> Kind:
    """The kind of job: the one that is set, else the first that the cluster serves and that can do what is asked.

    Without a cluster, which a dry run may be, it is the first that can.
    """
    if settings.kind != "auto":
        return kind_called(settings.kind)
    able = [kind for kind in KINDS if kind is not TRAIN_JOB or not settings.elastic]
    try:
        served = Cluster(params["namespace"], params["context"]).kinds
    except JobError:
        if not params["dry_run"]:
            raise
        served = list(KINDS)
    return next((kind for kind in able if kind in served), able[0])


def named_by(kind: Kind, settings: Settings) -> Named:
    """What a run's job names that has to be there before it."""
    return Named(
        claims=tuple(filter(None, (settings.runs_claim, settings.data_claim))),
        account=settings.service_account,
        queue=settings.queue,
        runtime=settings.runtime if kind is TRAIN_JOB else None,
    )


def settings_of(params: Mapping[str, Any]) -> Settings:
    """Settings from the values of hydra.launcher, which has a few keys more."""
    known = {name: value for name, value in params.items() if name in Settings.__dataclass_fields__}
    known["container"] = ContainerSettings(**params["container"])
    return Settings(**known)


def run_of(point: Point, sweep_dir: Path, settings: Settings) -> LaunchedRun:
    """The run of a point. UserError when it would write or read outside the claims."""
    if not point.run_dir.is_relative_to(RUNS_MOUNT) or str(point.run_dir) == RUNS_MOUNT:
        raise UserError(
            f"logging.save_dir={point.config.logging.save_dir} is not on the claim of the runs: pods have it at "
            f"{RUNS_MOUNT}; set logging.save_dir=runs"
        )
    copies_data = _copies_to_data_mount(point.config.data, settings)
    monitoring = point.config.monitoring
    port, arguments = monitoring.port or None, list(point.arguments)
    if not monitoring.enabled:
        port = None
    elif port is None:  # probes and `status` need the endpoint
        port = METRICS_PORT
        arguments.append(f"monitoring.port={port}")
    return LaunchedRun(
        job_name(point.run_dir),
        str(point.run_dir),
        arguments,
        port,
        point.name,
        sweep=job_name(sweep_dir),
        copies_data=copies_data,
    )


def _copies_to_data_mount(data: DataConfig, settings: Settings) -> bool:
    """Whether a run copies data of a store to where pods have the claim of the data.

    UserError for data that pods would not find, and for a copy where they cannot write.
    """
    if data.source != "shards":
        return False
    if is_url(data.dir or ""):
        cache = Path("/", data.cache_dir or "")
        if not any(cache.is_relative_to(mount) for mount in WRITABLE_MOUNTS):
            raise UserError(
                f"data.cache_dir={data.cache_dir}: pods can write below {', '.join(WRITABLE_MOUNTS)} alone; set "
                "data.cache_dir=/tmp/data (of each pod, and gone with it), or one on a claim: data/cache, runs/cache"
            )
        return cache.is_relative_to(DATA_MOUNT)
    if not Path("/", data.dir or "").is_relative_to(DATA_MOUNT):
        raise UserError(
            f"data.dir={data.dir} is not on the claim of the data: pods have it at {DATA_MOUNT}; "
            "set data.dir=data/NAME, or the URL of a store"
        )
    if settings.data_claim is None and not settings.prepare:
        raise UserError(
            f"hydra.launcher.data_claim=null: pods have nothing at data.dir={data.dir} then; name the claim that has "
            "it, or set data.dir to the URL of a store"
        )
    return False


def refuse(cluster: Cluster, runs: Sequence[LaunchedRun], jobs: Sequence[Object]) -> dict[str, Object]:
    """UserError for what could not be sent, before anything is. Returns the jobs that runs have already, by name."""
    there = {}
    for run, job in zip(runs, jobs, strict=True):
        try:
            found = cluster.get(run.name)
        except Missing:
            cluster.create(job, dry_run=True)
            continue
        refuse_another(run, job, found)
        there[run.name] = found
    return there


def refuse_another(run: LaunchedRun, job: Object, found: Object) -> None:
    """UserError when the job of a run's name is another's, or trains the run with other settings."""
    directory = annotation(found, RUN_ANNOTATION)
    if directory != run.directory:
        raise UserError(
            f"job {run.name} is not of {run.directory} but of {directory or 'something else'}: "
            "set another logging.run_name"
        )
    if state(found) not in OVER and not same_settings(job, found):
        raise UserError(
            f"{run.directory} is being trained by job {run.name} with other settings: `cyclevae k8s cancel {run.name}` "
            "first, or set another logging.run_name"
        )


def send(cluster: Cluster, job: Object, found: Object | None) -> str:
    """Create a run's job, in place of `found` where that was cancelled or failed; leave one that runs or is finished.

    Returns a word on what was there.
    """
    if found is not None:
        now = state(found)
        if now not in OVER or (now == FINISHED and same_settings(job, found)):
            return f"{now} already  "
        cluster.delete(found)
    cluster.create(job)
    return ""


def same_settings(one: Object, other: Object) -> bool:
    """Whether two jobs were made of the same settings."""
    return annotation(one, DIGEST_ANNOTATION) == annotation(other, DIGEST_ANNOTATION)


def wait(cluster: Cluster, kind: Kind, points: Mapping[str, str]) -> list[Outcome]:
    """Show the states of jobs until all are over; returns how each ended. Signals end the waiting alone.

    `points` has what sets each job's run apart.
    """
    leave_jobs_on_signals("cyclevae k8s")
    last: dict[str, Object] = {}
    show_changes(points, _states_until_over(cluster.changes(kind, OURS), points, last))
    return [_outcome(cluster, name, point, last.get(name)) for name, point in points.items()]


def _states_until_over(
    changes: Iterator[Mapping[str, Object]], points: Mapping[str, str], last: dict[str, Object]
) -> Iterator[dict[str, str]]:
    """States of the jobs that are not over, after every change, until all are. `last` gets the jobs as last seen."""
    for jobs in changes:
        last.clear()
        last.update(jobs)
        states = {name: state(jobs[name]) if name in jobs else "DELETED" for name in points}
        going_on = {name: now for name, now in states.items() if now not in OVER}
        yield going_on
        if not going_on:
            return


def _outcome(cluster: Cluster, name: str, point: str, job: Object | None) -> Outcome:
    log = f"cyclevae k8s logs {name}"
    if job is None:
        return Outcome(name, point, "DELETED", None, log)
    if state(job) == FINISHED:
        return Outcome(name, point, FINISHED, None, log)
    pods = cluster.pods(job)
    return Outcome(name, point, outcome(job, pods), first_failure(cluster, job, pods), log)
