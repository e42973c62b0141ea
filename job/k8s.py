"""`cyclevae k8s`: submit runs to a Kubernetes cluster, watch them, end them. Everything is read from the cluster's API server."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from job.errors import UserError
from job.launch.table import show
from job.launch.verbs import add_outputs, run


def submit(arguments: list[str], options: argparse.Namespace) -> None:
    """Submit a run or a sweep and return."""
    from job.launch.slurm.submission import submit_sweep

    where = [f"hydra.launcher.{name}={value}" for name in ("namespace", "context") if (value := getattr(options, name))]
    jobs = submit_sweep([*where, *arguments], options.dry_run, options.json, launcher="pytorchjob")
    if options.json:
        print(json.dumps(jobs))


def listed(options: argparse.Namespace) -> None:
    """Every run in the namespace."""
    from job.launch.kubernetes import status

    cluster = connect(options)
    show([status.row(cluster, job) for job in cluster.all()], options.json)


def told(options: argparse.Namespace) -> None:
    """Step, loss, rate, time left, restarts of runs."""
    from job.launch.kubernetes import status

    cluster = connect(options)
    show([status.row(cluster, job) for name in options.jobs for job in chosen(cluster, name)], options.json)


def logs(options: argparse.Namespace) -> None:
    """What the ranks print."""
    from job.launch.kubernetes import logs

    cluster = connect(options)
    cluster.get(options.job)
    if options.follow:
        logs.follow(cluster, options.job, options.lines)
    elif not cluster.pods(options.job):
        raise UserError(f"job {options.job} has no pods: cyclevae k8s status {options.job}")
    else:
        logs.show(cluster, options.job, options.lines)


def cancel(options: argparse.Namespace) -> None:
    """End jobs; they save first and can be resumed."""
    from job.launch.kubernetes import status
    from job.launch.kubernetes.manifests import QUEUE

    cluster = connect(options)
    for job in [job for name in options.jobs for job in chosen(cluster, name)]:
        name, now = job["metadata"]["name"], status.state(job)
        if now in status.OVER:
            print(f"job {name} is over already: {now}")
        elif QUEUE in job["metadata"]["labels"]:  # Kueue would start a suspended job again
            cluster.delete(name)
            print(f"deleted job {name}; submit it again with the same command and it goes on")
        else:
            cluster.suspend(name, True)
            print(f"cancelled job {name}")


def resume(options: argparse.Namespace) -> None:
    """Start cancelled and failed jobs again; they go on from their last checkpoint."""
    from job.launch.kubernetes import status
    from job.launch.kubernetes.manifests import RUN, to_yaml

    cluster = connect(options)
    jobs = {}
    for job in [job for name in options.jobs for job in chosen(cluster, name)]:
        name, now, metadata = job["metadata"]["name"], status.state(job), job["metadata"]
        if now not in ("SUSPENDED", "FAILED"):
            raise UserError(f"job {name} is {now}: nothing to resume")
        again = {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "spec": job["spec"],
            "metadata": {key: metadata[key] for key in ("name", "labels", "annotations") if key in metadata},
        }
        if options.dry_run:
            print(to_yaml([again]), end="")
        elif now == "SUSPENDED":
            cluster.suspend(name, False)
        else:
            cluster.delete(name)
            cluster.create(again)
        jobs[name] = metadata.get("annotations", {}).get(RUN, name)
    if not options.dry_run:
        print(
            json.dumps({run: name for name, run in jobs.items()})
            if options.json
            else "\n".join(f"job {name}: {run}" for name, run in jobs.items())
        )


def connect(options: argparse.Namespace) -> Any:
    from job.launch.kubernetes.cluster import Cluster

    return Cluster(options.namespace, options.context)


def chosen(cluster: Any, name: str) -> list[Any]:
    """The job called `name`, or the jobs of the sweep called so. UserError without any."""
    from job.launch.kubernetes.cluster import Missing
    from job.launch.kubernetes.manifests import SWEEP

    try:
        return [cluster.get(name)]
    except Missing:
        found = cluster.all(f"{SWEEP}={name}")
        if not found:
            raise
        return list(found)


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--namespace", help="default: the context's, else cyclevae")
    common.add_argument(
        "--context", help="of the kubeconfig; default: the current one, or the cluster of the pod this runs in"
    )
    top = argparse.ArgumentParser(prog="cyclevae k8s", description=__doc__)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    one = verbs.add_parser(
        "submit",
        parents=[common],
        help="submit a run or a sweep: the arguments of job.train",
        usage="cyclevae k8s submit [--dry-run] "
        "[--json] [--namespace NAME] [--context NAME] [--config-name NAME] OVERRIDES...",
        description="The overrides of `python -m "
        "job.train`; a list of values is a sweep: loss.cycle_text_weight=0.05,0.1. hydra.launcher.KEY=VALUE sets what the cluster is "
        "asked for (k8s/README.md).",
    )
    one.set_defaults(function=submit)
    for name, function, jobs in (
        ("list", listed, False),
        ("status", told, True),
        ("logs", logs, False),
        ("cancel", cancel, True),
        ("resume", resume, True),
    ):
        verb = verbs.add_parser(name, parents=[common], help=function.__doc__)
        verb.set_defaults(function=function)
        if jobs:
            verb.add_argument("jobs", nargs="+", metavar="JOB", help="a job or a sweep")
        if name == "logs":
            verb.add_argument("job", metavar="JOB")
            verb.add_argument("-f", "--follow", action="store_true", help="go on as lines are added, through restarts")
            verb.add_argument("-n", "--lines", type=int, default=50, help="of every pod (default: 50)")
    add_outputs(verbs, dry_run="print the manifests only")
    return top


def main(arguments: list[str] | None = None) -> int:
    """`cyclevae k8s VERB ...`."""
    return run(parser(), submit, arguments)


if __name__ == "__main__":
    sys.exit(main())
