"""hydra/launcher=pytorchjob: the points of a sweep become PyTorchJobs. The same point again finds its own job, and its run directory on the claim."""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig

from job.errors import UserError
from job.launch.kubernetes import manifests
from job.launch.kubernetes.cluster import OURS, Cluster, Missing
from job.launch.kubernetes.manifests import DATA, DIGEST, PORT, RUN, RUNS, Object, Run, Settings
from job.launch.kubernetes.status import OVER, first_failure, outcome, state
from job.launch.slurm.sweep import Point, points_of, submitted

LONGEST_NAME = 50  # the operator names pods and services NAME-worker-123, in at most 63 characters


def job_name(run_dir: Path) -> str:
    """Name of a run directory's job: a DNS label that begins with a letter; the directory's own name where it is one."""
    text = str(run_dir.relative_to(RUNS))
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    slug = slug if slug[:1].isalpha() else f"run-{slug}".rstrip("-")
    return (
        slug
        if slug == text and len(slug) <= LONGEST_NAME
        else f"{slug[: LONGEST_NAME - 9].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def run_of(point: Point, sweep_dir: Path) -> Run:
    """The run of a point. UserError when it would write or read outside the claims."""
    if not point.run_dir.is_relative_to(RUNS) or str(point.run_dir) == RUNS:
        raise UserError(
            f"logging.save_dir={point.config.logging.save_dir} is not on the claim of the runs: pods have it at {RUNS}; set logging.save_dir=runs"
        )
    data = point.config.data
    if data.source == "shards" and not Path("/", data.dir or "").is_relative_to(DATA):
        raise UserError(
            f"data.dir={data.dir} is not on the claim of the data: pods have it at {DATA}; set data.dir=data/NAME"
        )
    monitoring = point.config.monitoring
    port = (monitoring.port or PORT) if monitoring.enabled else None
    arguments = [*point.arguments, *([f"monitoring.port={PORT}"] if port and not monitoring.port else [])]
    return Run(job_name(point.run_dir), str(point.run_dir), arguments, port, point.name, job_name(sweep_dir))


def settings_of(params: dict[str, Any]) -> Settings:
    """Settings from the values of hydra.launcher."""
    known = {name: value for name, value in params.items() if name in Settings.__dataclass_fields__}
    return Settings(**{**known, "container": manifests.Container(**params["container"])})


def launch(
    config: DictConfig,
    context: HydraContext,
    params: dict[str, Any],
    job_overrides: Sequence[Sequence[str]],
    _initial: int,
) -> list[JobReturn]:
    """What hydra/launcher=pytorchjob does with a batch of points. UserError when a run failed."""
    points = points_of(config, context, job_overrides, Path("/"))
    settings = settings_of(params)
    runs = [run_of(point, Path("/", config.hydra.sweep.dir)) for point in points]
    jobs = [manifests.pytorch_job(run, settings) for run in runs]
    returns = [
        JobReturn(overrides=overrides, working_dir=run.directory, status=JobStatus.COMPLETED)
        for overrides, run in zip(job_overrides, runs, strict=True)
    ]
    if params["dry_run"]:
        print(manifests.to_yaml(jobs), end="")
        return returns
    cluster = Cluster(params["namespace"], params["context"])
    for run, job, there in zip(runs, jobs, refuse(cluster, runs, jobs), strict=True):
        words = send(cluster, job, there)
        submitted.append({"job": run.name, "run": run.directory})
        print(f"job {run.name}: {words}{run.overrides}  ({run.directory})", flush=True)
    if params["wait"]:
        wait(cluster, {run.name: run for run in runs})
    return returns


def refuse(cluster: Cluster, runs: Sequence[Run], jobs: Sequence[Object]) -> list[Object | None]:
    """The job that each run has already. UserError for what could not be sent, before anything is."""
    found: list[Object | None] = []
    for run, job in zip(runs, jobs, strict=True):
        try:
            there = cluster.get(run.name)
        except Missing:
            cluster.create(job, dry_run=True)
            there = None
        if there is not None:
            theirs = there["metadata"].get("annotations") or {}
            if theirs.get(RUN) != run.directory:
                raise UserError(
                    f"job {run.name} is not of {run.directory} but of {theirs.get(RUN, 'something else')}: set another logging.run_name"
                )
            if state(there) not in OVER and theirs.get(DIGEST) != job["metadata"]["annotations"][DIGEST]:
                raise UserError(
                    f"{run.directory} is being trained by job {run.name} with other settings: `cyclevae k8s cancel {run.name}` first, "
                    "or set another logging.run_name"
                )
        found.append(there)
    cluster.refuse_missing(jobs[0])
    return found


def send(cluster: Cluster, job: Object, there: Object | None) -> str:
    """Create a run's job, in place of one that was cancelled or failed; leave one that runs or is finished. Returns a word on what was there."""
    if there is not None:
        now, same = (
            state(there),
            (there["metadata"].get("annotations") or {}).get(DIGEST) == job["metadata"]["annotations"][DIGEST],
        )
        if now not in OVER or (now == "COMPLETED" and same):
            return f"{now} already  "
        cluster.delete(job["metadata"]["name"])
    cluster.create(job)
    return ""


def wait(cluster: Cluster, runs: dict[str, Run]) -> None:
    """Until every job is over, then one line a run. UserError when one failed. Signals end the waiting, not the jobs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, leave_jobs)
    known: dict[str, str] = {}
    jobs: dict[str, Object] = {}
    for jobs in cluster.changes(OURS):
        for name, run in runs.items():
            now = state(jobs[name]) if name in jobs else "DELETED"
            if known.get(name) != now and now not in OVER:
                print(f"job {name}: {now}  ({run.overrides})", flush=True)
            known[name] = now
        if all(now in OVER for now in known.values()):
            break
    for name, run in runs.items():
        print(
            f"job {name}: {outcome(cluster, jobs[name]) if name in jobs else 'DELETED'}  ({run.overrides})", flush=True
        )
        if known[name] != "COMPLETED":
            print(
                f"    {(first_failure(cluster, jobs[name]) if name in jobs else None) or 'no message'}\n    log: cyclevae k8s logs {name}",
                flush=True,
            )
    failed = sum(now != "COMPLETED" for now in known.values())
    if failed:
        raise UserError(
            f"{failed} of {len(runs)} runs did not finish; give the same command again when the cause is mended: finished ones stay finished"
        )


def leave_jobs(number: int, _frame: Any) -> None:
    """Handler of signals: this program ends, the jobs go on."""
    os.write(2, b"the jobs go on without this program: see `cyclevae k8s list`, end them with `cyclevae k8s cancel`\n")
    os._exit(128 + number)
