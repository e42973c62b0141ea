"""hydra/launcher=slurm: the points of a sweep become SLURM jobs, each in a run directory that stays the same whenever it is submitted."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from submitit.core.utils import FailedJobError

from job.config import Config, targets_dir
from job.config_checks import validate
from job.errors import UserError
from job.files import write_json
from job.launch.slurm import container, scheduler
from job.launch.slurm.run_directory import RunDirectory

OURS = (
    "submitit_folder",
    "max_num_timeout",
    "max_restarts",
    "python",
    "container",
    "wait",
    "dry_run",
    "setup",
    "additional_parameters",
    "srun_args",
)
LAUNCHING = (
    "hydra.launcher",
    "hydra/launcher",
    "hydra.sweep",
    "hydra/sweeper",
    "hydra.mode",
    "hydra.run.dir",
    "hydra.job.config.override_dirname",
)  # not for the runs
BATCH = Path(__file__).with_name("batch.sh")
POLL_SECONDS = 10.0
submitted: list[dict[str, str]] = []  # by this process: job, run directory


@dataclass(frozen=True)
class Point:
    """One run of the sweep: its directory, its overrides in words, and the arguments of job.train."""

    run_dir: Path
    targets: Path  # where it announces its metrics
    name: str
    arguments: list[str]
    config: Config


class Executor(submitit.SlurmExecutor):
    """submitit's executor for job scripts of ours: its sbatch options and its folder, no pickles."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # a script can be shown where there is no SLURM

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        # sbatch takes variables before what a script says; those of a surrounding job would be taken for this one's.
        unset = [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]
        unset += [
            f"SBATCH_{name}"
            for name in ("PARTITION", "ACCOUNT", "QOS", "CONSTRAINT", "GRES")
            if self.parameters.get(name.lower())
        ]
        unset += ["SBATCH_TIMELIMIT"] if self.parameters.get("time") else []
        return ["env", *(part for name in unset for part in ("-u", name)), "sbatch", str(submission_file_path)]


def points_of(
    config: DictConfig,
    context: HydraContext,
    job_overrides: Sequence[Sequence[str]],
    working_directory: Path | None = None,
) -> list[Point]:
    """The sweep's points, for runs that start in `working_directory`. Their configurations are refused here, before they have waited in a queue."""
    hydra = [override for override in config.hydra.overrides.hydra if not override.lstrip("+~").startswith(LAUNCHING)]
    sources = [source.path for source in config.hydra.runtime.config_sources if source.provider == "command-line"]
    shared = [
        "--config-name",
        config.hydra.job.config_name,
        *(part for path in sources for part in ("--config-dir", path)),
        *hydra,
    ]
    points = []
    for overrides in job_overrides:
        values = context.config_loader.load_sweep_config(config, list(overrides))
        run_dir = (working_directory or Path.cwd()) / values.hydra.sweep.dir / values.hydra.sweep.subdir
        common = values.hydra.job.config.override_dirname.exclude_keys
        name = (
            " ".join(override for override in overrides if override.split("=")[0].lstrip("+~") not in common)
            or run_dir.name
        )
        OmegaConf.set_struct(values, False)
        del values["hydra"]
        checked: Config = OmegaConf.to_object(values)  # type: ignore[assignment]
        validate(checked)
        escaped = str(run_dir).replace("\\", "\\\\").replace("'", "\\'")
        points.append(
            Point(run_dir, targets_dir(checked), name, [*shared, *overrides, f"hydra.run.dir='{escaped}'"], checked)
        )
    for point in points:
        if [other.run_dir for other in points].count(point.run_dir) > 1:
            raise UserError(f"two points of the sweep have the run directory {point.run_dir}: leave one out")
    return points


def job_script(points: Sequence[Point], params: dict[str, Any]) -> tuple[Executor, str]:
    """submitit's executor for these points, and the command of its job script."""
    way = container.entry(
        params["container"],
        [os.getcwd(), *(str(point.run_dir.parent) for point in points), *(str(point.targets) for point in points)],
    )
    python = (
        shlex.split(params["python"])
        if params["python"]
        else ["python"]
        if params["container"]["runtime"]
        else [sys.executable]
    )
    cpus = (
        [f"--cpus-per-task={params['cpus_per_task']}"] if params["cpus_per_task"] else []
    )  # srun does not take it from the job
    srun = [
        "srun",
        "--label",
        "--kill-on-bad-exit=0",
        "--wait=600",
        *cpus,
        *params["srun_args"],
        *way.srun_options,
        *way.command,
        *python,
        "-m",
        "job.train",
    ]
    cases = [
        f"{number}) supervise {shlex.quote(str(point.run_dir))} {shlex.quote(str(point.targets))} {params['max_restarts']} "
        f"{shlex.join([*srun, *point.arguments])} ;;"
        for number, point in enumerate(points)
    ]
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in way.variables.items()]
    executor = Executor(folder=params["submitit_folder"])
    executor.update_parameters(
        **executor._convert_parameters(
            {
                **{
                    name: value
                    for name, value in params.items()
                    if name not in OURS and (value is not None or name == "timeout_min")
                },
                "tasks_per_node": params["tasks_per_node"] or params["gpus_per_node"] or 1,
                "setup": [BATCH.read_text(), *(params["setup"] or []), *exports],
                "use_srun": False,
                "stderr_to_stdout": True,
                "wckey": None,
                "additional_parameters": {"requeue": True, "signal": f"B:USR1@{params['signal_delay_s']}"}
                | params["additional_parameters"],
            }
        )
    )
    if len(points) > 1:
        executor.parameters["map_count"] = len(points)
    return executor, "\n".join(['case "${SLURM_ARRAY_TASK_ID:-0}" in', *cases, "esac"])


def submit(points: Sequence[Point], params: dict[str, Any]) -> list[str]:
    """Hand a job array of at most MaxArraySize points to SLURM; returns their job ids."""
    executor, command = job_script(points, params)
    Path(executor.folder).mkdir(parents=True, exist_ok=True)
    try:
        job = executor._submit_command(command)
    except (FailedJobError, OSError) as error:
        raise UserError(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}") from error
    ids = [f"{job.job_id}_{number}" for number in range(len(points))] if len(points) > 1 else [job.job_id]
    *sbatch, script = executor._make_submission_command(job.paths.submission_file)
    for number, (point, job_id) in enumerate(zip(points, ids, strict=True)):
        again = [
            *sbatch,
            "--parsable",
            f"--chdir={os.getcwd()}",
            *([f"--array={number}"] if len(points) > 1 else []),
            script,
        ]
        write_json(
            point.run_dir / "slurm" / "submission.json",
            {"job": job_id, "again": again, "index": number if len(points) > 1 else None, "time": time.time()},
        )
    return ids


def launch(
    config: DictConfig,
    context: HydraContext,
    params: dict[str, Any],
    job_overrides: Sequence[Sequence[str]],
    _initial: int,
) -> list[JobReturn]:
    """What hydra/launcher=slurm does with a batch of points. UserError when a run failed."""
    points = points_of(config, context, job_overrides)
    returns = [
        JobReturn(overrides=overrides, working_dir=str(point.run_dir), status=JobStatus.COMPLETED)
        for overrides, point in zip(job_overrides, points, strict=True)
    ]
    at_once = scheduler.max_array_size() if scheduler.available() else len(points)
    parts = [points[start : start + at_once] for start in range(0, len(points), at_once)]
    if params["dry_run"]:
        for part in parts:
            executor, command = job_script(part, params)
            print(executor._make_submission_file_text(command, ""))
        return returns
    live = scheduler.queued()
    for point in points:
        busy = RunDirectory(point.run_dir).job
        if busy in live:
            raise UserError(
                f"{point.run_dir} is being trained by job {busy}: `cyclevae slurm cancel {busy}` first, or set another logging.run_name"
            )
    jobs: dict[str, Point] = {}
    for part in parts:
        ids = submit(part, params)
        jobs.update(zip(ids, part, strict=True))
        for job, point in zip(ids, part, strict=True):
            submitted.append({"job": job, "run": str(point.run_dir)})
            print(f"job {job}: {point.name}  ({point.run_dir})", flush=True)
    if params["wait"]:
        summarize(wait(jobs))
    return returns


def wait(jobs: dict[str, Point]) -> dict[str, tuple[Point, str]]:
    """Until no job is in the queue; what became of each. Signals end the waiting, not the jobs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, leave_jobs)
    known: dict[str, str] = {}
    absent = 0
    while True:
        try:
            live = scheduler.queued()
        except UserError as error:  # a controller that restarts
            print(f"warning: {error}; asking again", file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
            continue
        for job, point in jobs.items():
            if job in live and known.get(job) != live[job]:
                print(f"job {job}: {live[job]}  ({point.name})", flush=True)
        known |= live
        absent = 0 if live.keys() & jobs.keys() else absent + 1
        if absent == 2:  # once may be a job between two lives
            return {job: (point, RunDirectory(point.run_dir).outcome(job)) for job, point in jobs.items()}
        time.sleep(min(POLL_SECONDS, 1.0 + len(jobs) / 10))


def leave_jobs(number: int, _frame: Any) -> None:
    """Handler of signals: this program ends, the jobs go on."""
    os.write(
        2, b"the jobs go on without this program: see `cyclevae slurm list`, end them with `cyclevae slurm cancel`\n"
    )
    os._exit(128 + number)


def summarize(outcomes: dict[str, tuple[Point, str]]) -> None:
    """One line a run; UserError when one failed."""
    failed = 0
    for job, (point, outcome) in outcomes.items():
        run = RunDirectory(point.run_dir)
        print(f"job {job}: {outcome}  ({point.name})", flush=True)
        if outcome != "COMPLETED":
            failed += 1
            print(f"    {run.first_failure(job) or 'no message'}\n    log: {run.log(job)}", flush=True)
    if failed:
        raise UserError(
            f"{failed} of {len(outcomes)} runs did not finish; give the same command again when the cause is mended: finished ones stay finished"
        )
