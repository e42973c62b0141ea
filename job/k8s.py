"""`cyclevae k8s`: submit runs to a Kubernetes cluster, watch them, end them.

Everything is read from the cluster's API server. Its client takes a second to import, so verbs import what they need.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job.errors import UserError
from job.launch.command_line import add_log_options, add_outputs, add_submit, add_verb, run
from job.launch.run_status import show


def submit(arguments: list[str], options: argparse.Namespace) -> None:
    """Submit a run or a sweep and return."""
    from job.launch.submission import submit_sweep

    given = {"namespace": options.namespace, "context": options.context}
    where = [f"hydra.launcher.{name}={value}" for name, value in given.items() if value]
    submit_sweep("kubernetes", [*where, *arguments], options.dry_run, options.json)


def list_runs(options: argparse.Namespace) -> None:
    """Every run in the namespace."""
    from job.launch.kubernetes.status import run_status

    cluster = connect(options)
    show([run_status(cluster, job) for job in cluster.all()], options.json)


def status(options: argparse.Namespace) -> None:
    """Step, loss, rate, time left, restarts of runs."""
    from job.launch.kubernetes.status import run_status

    cluster = connect(options)
    show([run_status(cluster, job) for job in chosen(cluster, options.jobs)], options.json)


def logs(options: argparse.Namespace) -> None:
    """What the ranks print."""
    from job.launch.kubernetes import logs
    from job.launch.kubernetes.names import named_job

    cluster = connect(options)
    job = cluster.get(named_job(options.job))
    if options.follow:
        logs.follow(cluster, job, options.lines)
    elif not cluster.pods(job):
        raise UserError(f"job {options.job} has no pods: cyclevae k8s status {options.job}")
    else:
        logs.show(cluster, job, options.lines)


def wait(options: argparse.Namespace) -> None:
    """Wait until jobs are over; exit code 1 when one failed."""
    from job.launch.kubernetes.kinds import annotation, kind_of
    from job.launch.kubernetes.names import OVERRIDES_ANNOTATION, RUN_ANNOTATION
    from job.launch.kubernetes.sweep import wait as until_over
    from job.launch.waiting import compare_runs, summarize

    cluster = connect(options)
    jobs = chosen(cluster, options.jobs)
    outcomes = []
    for kind in {kind_of(job) for job in jobs}:
        points = {
            job["metadata"]["name"]: annotation(job, OVERRIDES_ANNOTATION) or job["metadata"]["name"]
            for job in jobs
            if kind_of(job) == kind
        }
        outcomes += until_over(cluster, kind, points)
    summarize(outcomes, [Path(run) for job in jobs if (run := annotation(job, RUN_ANNOTATION))])
    compare_runs()


def cancel(options: argparse.Namespace) -> None:
    """End jobs; they save first and can be resumed."""
    from job.launch.kubernetes.kinds import OVER, is_queued, state
    from job.launch.kubernetes.names import CANCELLED_ANNOTATION
    from job.launch.kubernetes.status import last_progress_to_note

    cluster = connect(options)
    for job in chosen(cluster, options.jobs):
        name, now = job["metadata"]["name"], state(job)
        if now in OVER:
            print(f"job {name} is over already: {now}")
            continue
        noted = {CANCELLED_ANNOTATION: last_progress_to_note(cluster, job)}
        if not is_queued(job):
            cluster.suspend(job, True, noted)
        else:  # Kueue would start a suspended job again, unless its Workload is not active
            cluster.annotate(job, noted)
            workload = cluster.workload(job)
            if workload is not None:
                cluster.activate(workload, False)
        print(f"cancelled job {name}")


def resume(options: argparse.Namespace) -> None:
    """Start cancelled and failed jobs again; they go on from their last checkpoint."""
    from job.launch.kubernetes.kinds import annotation, state
    from job.launch.kubernetes.manifests import to_yaml
    from job.launch.kubernetes.names import RUN_ANNOTATION

    cluster = connect(options)
    resumed: dict[str, str] = {}
    for job in resumable(cluster, options.jobs):
        name = job["metadata"]["name"]
        if options.dry_run:
            print(to_yaml([fresh(job)]), end="")
        elif state(job) == "SUSPENDED":
            wake(cluster, job)
        else:
            cluster.delete(job)
            cluster.create(fresh(job))
        resumed[name] = annotation(job, RUN_ANNOTATION) or name
    if options.dry_run:
        return
    if options.json:
        print(json.dumps({run: name for name, run in resumed.items()}))
    else:
        print("\n".join(f"job {name}: {run}" for name, run in resumed.items()))


def resumable(cluster: Any, names: Sequence[str]) -> list[Any]:
    """The jobs of these names that were cancelled or have failed. UserError for a name without any.

    Of a sweep the others are passed over: what runs or is finished needs no resuming.
    """
    from job.launch.kubernetes.kinds import state

    found = []
    for name in names:
        jobs = chosen(cluster, [name])
        left = [job for job in jobs if state(job) in ("SUSPENDED", "FAILED")]
        if not left:
            states = ", ".join(sorted({state(job) for job in jobs}))
            raise UserError(f"job {name} is {states}: nothing to resume")
        found += left
    return found


def wake(cluster: Any, job: dict[str, Any]) -> None:
    """Let a cancelled job go on, as soon as Kueue has room for it where it is in a queue."""
    from job.launch.kubernetes.kinds import is_queued
    from job.launch.kubernetes.names import CANCELLED_ANNOTATION

    forgotten = {CANCELLED_ANNOTATION: None}
    if not is_queued(job):
        cluster.suspend(job, False, forgotten)
        return
    workload = cluster.workload(job)
    if workload is not None:
        cluster.activate(workload, True)
    cluster.annotate(job, forgotten)


def fresh(job: dict[str, Any]) -> dict[str, Any]:
    """A job as it was sent, without what the server and the operator have added."""
    from job.launch.kubernetes.names import CANCELLED_ANNOTATION

    metadata = {key: dict(job["metadata"][key]) for key in ("labels", "annotations") if key in job["metadata"]}
    metadata.get("annotations", {}).pop(CANCELLED_ANNOTATION, None)
    return {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "spec": job["spec"],
        "metadata": {"name": job["metadata"]["name"], **metadata},
    }


def connect(options: argparse.Namespace) -> Any:
    """The namespace of the cluster that the options name."""
    from job.launch.kubernetes.cluster import Cluster

    return Cluster(options.namespace, options.context)


def chosen(cluster: Any, names: Sequence[str]) -> list[Any]:
    """The jobs called so, and those of the sweeps called so; `runs/NAME` is the job of that run, or the sweep there.

    Missing without any of a name.
    """
    from job.launch.kubernetes.cluster import Missing
    from job.launch.kubernetes.names import SWEEP_LABEL, named_job

    found = []
    for name in map(named_job, names):
        try:
            found.append(cluster.get(name))
        except Missing:
            of_sweep = cluster.all(f"{SWEEP_LABEL}={name}")
            if not of_sweep:
                raise
            found += of_sweep
    return found


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--namespace", help="default: the context's, else cyclevae")
    common.add_argument(
        "--context", help="of the kubeconfig; default: the current one, or the cluster of the pod this runs in"
    )
    parents = [common]
    top = argparse.ArgumentParser(prog="cyclevae k8s", description=__doc__)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    add_submit(verbs, submit, "k8s", "reference/kubernetes", "[--namespace NAME] [--context NAME] ", parents)
    add_verb(verbs, "list", list_runs, parents)
    several = [add_verb(verbs, "status", status, parents)]

    output = add_verb(verbs, "logs", logs, parents)
    output.add_argument("job", metavar="JOB", help="a job, or the directory of its run")
    add_log_options(output, "go on as lines are added, through restarts", "of every pod (default: 50)")

    several += [
        add_verb(verbs, "wait", wait, parents),
        add_verb(verbs, "cancel", cancel, parents),
        add_verb(verbs, "resume", resume, parents),
    ]
    for verb in several:
        verb.add_argument("jobs", nargs="+", metavar="JOB", help="a job or a sweep, or the directory of one: runs/NAME")
    add_outputs(verbs, dry_run="print the manifests only")
    return top


def main(arguments: list[str] | None = None) -> int:
    """`cyclevae k8s VERB ...`."""
    return run(parser(), submit, arguments)


if __name__ == "__main__":
    sys.exit(main())
