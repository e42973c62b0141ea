"""The job script of a sweep's points, and the options with which sbatch takes it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from job.errors import UserError
from job.launch.points import Point
from job.launch.slurm import container, scheduler

BATCH = Path(__file__).with_name("batch.sh")
BAD_NODES = Path(__file__).with_name("bad_nodes.sh")
# Keys of hydra.launcher that are not options of sbatch, or that are handed over below in another form.
NOT_FOR_SBATCH = {
    "submitit_folder",
    "max_num_timeout",
    "max_restarts",
    "exclude_bad_nodes",
    "python",
    "container",
    "wait",
    "dry_run",
    "setup",
    "additional_parameters",
    "srun_args",
}
# What a site may set for all its jobs, as sbatch options and as the variables SBATCH_...
SITE_DEFAULTS = {
    "partition": "PARTITION",
    "account": "ACCOUNT",
    "qos": "QOS",
    "constraint": "CONSTRAINT",
    "gres": "GRES",
    "time": "TIMELIMIT",
}


class Executor(submitit.SlurmExecutor):
    """submitit's executor for job scripts of ours: its sbatch options and its folder, no pickles."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # more than none without SLURM: a script can be shown there

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        """sbatch, without the variables that would win over what the script says.

        sbatch takes variables before a script's own #SBATCH lines: those of a job in which this program runs would be
        taken for the new job's, and the site's defaults for what the user asked for.
        """
        asked = [name for name in SITE_DEFAULTS if self.parameters.get(name)]
        without = scheduler.without_variables([f"SBATCH_{SITE_DEFAULTS[name]}" for name in asked])
        return [*without, "sbatch", str(submission_file_path)]


def job_script(points: Sequence[Point], params: dict[str, Any]) -> tuple[Executor, str]:
    """submitit's executor for these points, and the command of their job script.

    Several points are an array: the script has a case for each, chosen by SLURM_ARRAY_TASK_ID. `params` are the
    values of hydra.launcher.
    """
    mounted = [os.getcwd(), *(str(point.run_dir.parent) for point in points), *(str(point.targets) for point in points)]
    entry = container.entry(params["container"], mounted)
    srun = _srun_command(entry, params)
    cases = [f"{number}) {_supervise(point, srun, params)} ;;" for number, point in enumerate(points)]
    command = "\n".join(['case "${SLURM_ARRAY_TASK_ID:-0}" in', *cases, "esac"])
    return _executor(entry, len(points), params), command


def _srun_command(entry: container.Entry, params: dict[str, Any]) -> list[str]:
    """srun up to job.train; a point's arguments follow."""
    # A rank that fails must not end the others at once: they save first, or say what they lost. After --wait they are
    # ended all the same. --label puts the rank before every line of the common log.
    srun = ["srun", "--label", "--kill-on-bad-exit=0", "--wait=600"]
    if params["cpus_per_task"]:
        srun.append(f"--cpus-per-task={params['cpus_per_task']}")  # srun does not take it from the job
    if params["python"]:
        python = shlex.split(params["python"])
    elif params["container"]["runtime"]:
        python = ["python"]  # the image's
    else:
        python = [sys.executable]
    return [*srun, *params["srun_args"], *entry.srun_options, *entry.command, *python, "-m", "job.train"]


def _supervise(point: Point, srun: Sequence[str], params: dict[str, Any]) -> str:
    """The line that calls `supervise` of batch.sh for a point."""
    directories = f"{shlex.quote(str(point.run_dir))} {shlex.quote(str(point.targets))}"
    return f"supervise {directories} {params['max_restarts']} {shlex.join([*srun, *point.arguments])}"


def _executor(entry: container.Entry, points: int, params: dict[str, Any]) -> Executor:
    """submitit's executor with the options of sbatch that `params` mean."""
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in entry.variables.items()]
    # A line that fails ends the job. Not by `set -e`, which many a module's own scripts do not survive.
    setup = [f"eval {shlex.quote(line)} || setup_failed $? {shlex.quote(line)}" for line in params["setup"] or []]
    settings = [
        f"signal_delay={signal_delay(params)}",
        f"CYCLEVAE_EXCLUDE_BAD_NODES={int(params['exclude_bad_nodes'])}",
    ]
    options = {"requeue": True, "signal": f"B:USR1@{params['signal_delay_s']}"} | params["additional_parameters"]
    if options["requeue"] is False:  # submitit writes --requeue=False, which sbatch does not know
        del options["requeue"]
        options["no-requeue"] = True
    asked = {name: value for name, value in params.items() if name not in NOT_FOR_SBATCH and value is not None}
    asked |= {
        "timeout_min": params["timeout_min"],  # also when None: submitit would make five minutes of a missing one
        "tasks_per_node": tasks_per_node(params),
        "setup": [BATCH.read_text(), BAD_NODES.read_text(), *settings, *setup, *exports],
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": options,
    }
    folder = str(params["submitit_folder"])
    if "%" in folder or "\\" in folder:
        raise UserError(
            f"{folder}: sbatch takes % and \\ in the names of its files for its own signs; give logging.run_name and "
            "logging.save_dir others, or set hydra.launcher.submitit_folder"
        )
    executor = Executor(folder=folder)
    executor.update_parameters(**executor._convert_parameters(asked))
    if points > 1:
        executor.parameters["map_count"] = points
    return executor


def tasks_per_node(params: dict[str, Any]) -> int:
    """Ranks of a node: one for each of its GPUs, unless another number is asked for."""
    return int(params["tasks_per_node"] or params["gpus_per_node"] or 1)


def signal_delay(params: dict[str, Any]) -> int:
    """Seconds before the time limit at which SLURM signals the job.

    UserError where the limit is known to be no longer: the job would be told to stop as soon as it starts, and be
    requeued for ever. Where the partition sets the limit, the batch step compares.
    """
    delay = int(params["signal_delay_s"])
    signal = str(params["additional_parameters"].get("signal", ""))
    if signal.rpartition("@")[2].isdigit():  # B:USR1@300
        delay = int(signal.rpartition("@")[2])
    minutes = params["timeout_min"]
    if minutes is not None and delay >= 60 * minutes:
        raise UserError(
            f"hydra.launcher.signal_delay_s={delay} is not below hydra.launcher.timeout_min={minutes}: the run would "
            "be told to stop as soon as it starts; give it more time or a shorter delay"
        )
    return delay
