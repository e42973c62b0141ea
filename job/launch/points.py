"""The points of a sweep: one run each, with its directory and the arguments of job.train that start it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from job.batch_sizes import batch_sizes
from job.config import Config, targets_dir
from job.config_checks import validate
from job.errors import UserError

# Overrides that say how the sweep is launched, not how a run trains: with them, a run would launch jobs itself.
LAUNCHING = (
    "hydra.launcher",
    "hydra/launcher",
    "hydra.sweep",
    "hydra/sweeper",
    "hydra.mode",
    "hydra.run.dir",
    "hydra.job.config.override_dirname",
)


@dataclass(frozen=True)
class Point:
    """One run of the sweep."""

    run_dir: Path
    targets: Path  # directory in which it announces its metrics' addresses
    name: str  # the overrides that set it apart from the other points
    arguments: list[str]  # of job.train
    config: Config


def points_of(
    config: DictConfig,
    context: HydraContext,
    job_overrides: Sequence[Sequence[str]],
    working_directory: Path | None = None,
) -> list[Point]:
    """The points of a sweep, one for each list of overrides in `job_overrides`.

    `config` is the sweep's own configuration, and the runs start in `working_directory` (default: the current one).
    UserError for a configuration that job.train would refuse: it is told here, before a job has waited in a queue.
    """
    root = working_directory or Path.cwd()
    shared = _shared_arguments(config)
    points = [_point(config, context, overrides, root, shared) for overrides in job_overrides]
    run_dirs = [point.run_dir for point in points]
    for run_dir in run_dirs:
        if run_dirs.count(run_dir) > 1:
            raise UserError(f"two points of the sweep have the run directory {run_dir}: leave one out")
    return points


def refuse_batch_sizes(points: Iterable[Point], nodes: Iterable[int], tasks: int) -> None:
    """UserError when a run's batch does not divide among its ranks: `tasks` on each node, on any number of `nodes`."""
    for number in nodes:
        for point in points:
            try:
                batch_sizes(point.config.training, number * tasks)
            except UserError as error:
                raise UserError(f"on {number} {'node' if number == 1 else 'nodes'} of {tasks}: {error}") from error


def _shared_arguments(config: DictConfig) -> list[str]:
    """The arguments of job.train that all points have: which configuration it is, and the user's settings of Hydra."""
    arguments = ["--config-name", config.hydra.job.config_name]
    for source in config.hydra.runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", source.path]
    for override in config.hydra.overrides.hydra:
        if not override.lstrip("+~").startswith(LAUNCHING):
            arguments.append(override)
    return arguments


def _point(
    config: DictConfig, context: HydraContext, overrides: Sequence[str], root: Path, shared: Sequence[str]
) -> Point:
    values = context.config_loader.load_sweep_config(config, list(overrides))
    run_dir = root / values.hydra.sweep.dir / values.hydra.sweep.subdir
    common = values.hydra.job.config.override_dirname.exclude_keys
    differing = [override for override in overrides if override.split("=")[0].lstrip("+~") not in common]
    OmegaConf.set_struct(values, False)
    del values["hydra"]  # Hydra's own settings are no keys of Config
    checked: Config = OmegaConf.to_object(values)  # type: ignore[assignment]
    validate(checked)
    return Point(
        run_dir=run_dir,
        targets=targets_dir(checked),
        name=" ".join(differing) or run_dir.name,
        arguments=[*shared, *overrides, f"hydra.run.dir={_quoted(str(run_dir))}"],
        config=checked,
    )


def _quoted(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar of overrides: run directories have `=` and commas in their names."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def returns_of(job_overrides: Sequence[Sequence[str]], points: Sequence[Point]) -> list[JobReturn]:
    """What a launcher returns to Hydra for points that it submitted; it reports failed runs by itself."""
    return [
        JobReturn(overrides=overrides, working_dir=str(point.run_dir), status=JobStatus.COMPLETED)
        for overrides, point in zip(job_overrides, points, strict=True)
    ]
