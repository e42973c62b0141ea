"""`cyclevae doctor [RUN|MODEL|--slurm|--k8s]`: what keeps a machine, a cluster, a run or a model from training well."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from job.checks import Check, all_well, show
from job.command import guarded
from job.errors import ExitCode, UsageError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.doctor",
        description="Verdicts, and the way out of each trouble. Exit code 0: all is well. Without a path: the machine.",
    )
    p.add_argument("path", type=Path, nargs="?", help="run directory, exported model, weight file, LGDLM checkpoint")
    p.add_argument("--slurm", action="store_true", help="the SLURM cluster instead")
    p.add_argument("--k8s", action="store_true", help="the Kubernetes cluster instead")
    p.add_argument("--namespace", help="of --k8s")
    p.add_argument("--context", help="of --k8s")
    p.add_argument("--dir", type=Path, default=Path("runs"), help="where runs will be written (%(default)s)")
    p.add_argument("--json", action="store_true", help="for programs")
    return p


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """The command; returns whether all is well."""
    options = parser().parse_args(argv)
    if sum((options.path is not None, options.slurm, options.k8s)) > 1:
        raise UsageError("give one of PATH, --slurm and --k8s")
    checks = examined(options)
    show(checks, options.json)
    return ExitCode.FINISHED if all_well(checks) else ExitCode.FAILED


def examined(options: argparse.Namespace) -> list[Check]:
    """The checks that the command line asks for. What each needs is imported where it is asked for: launchers' need no
    torch, and the Kubernetes client takes a second.
    """
    if options.slurm:
        from job.launch.slurm.health import slurm_checks

        return slurm_checks()
    if options.k8s:
        from job.launch.kubernetes.health import kubernetes_checks

        return kubernetes_checks(options.namespace, options.context)
    if options.path is not None:
        from job.health.models import path_checks

        return path_checks(options.path)
    from job.health.gpus import gpu_checks, gpu_facts
    from job.health.loopback import loopback_check
    from job.health.system import system_checks

    facts = gpu_facts()
    return [*gpu_checks(facts), loopback_check(len(facts.names)), *system_checks(options.dir)]


if __name__ == "__main__":
    sys.exit(guarded(main))
