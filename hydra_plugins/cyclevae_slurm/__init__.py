"""hydra/launcher=slurm: the keys of hydra-submitit-launcher, and ours. What it does is in job.launch.slurm.sweep."""

# Without `from __future__ import annotations`, which makes strings of annotations: dataclasses look their names up in
# sys.modules, and Hydra loads plugins without an entry there.
from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn

# As modules: Hydra takes every launcher class that is a name in a plugin for one that the plugin offers.
from hydra_plugins.hydra_submitit_launcher import config, submitit_launcher


@dataclass
class RankContainer:
    """The container in which the ranks of a run live (job.launch.slurm.container)."""

    runtime: str | None = None  # pyxis (srun --container-image) or apptainer; null: no container
    image: str | None = None
    # HOST:CONTAINER[:ro]; the working directory and the runs are always mounted
    mounts: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)  # variables set for the ranks
    options: list[str] = field(default_factory=list)  # further options of srun (pyxis) or apptainer exec


@dataclass
class SlurmConf(config.SlurmQueueConf):
    _target_: str = "hydra_plugins.cyclevae_slurm.SlurmLauncher"
    submitit_folder: str = "${hydra.sweep.dir}/.submitit"
    name: str = "${logging.run_name}"
    timeout_min: int | None = None  # minutes; null: the partition's default
    tasks_per_node: int | None = None  # null: one per GPU
    signal_delay_s: int = 180  # seconds before the time limit at which the run saves and is requeued
    max_restarts: int = 5  # restarts in a row without a new checkpoint, after which the job fails
    exclude_bad_nodes: bool = True  # a node that lost ranks in two starts is excluded when the job is requeued
    srun_args: list[str] = field(default_factory=list)
    python: str | None = None  # command of Python; null: the submitter's, in a container the image's `python`
    container: RankContainer = field(default_factory=RankContainer)
    wait: bool = True  # stay until all runs have ended
    dry_run: bool = False  # print the job scripts, submit nothing


ConfigStore.instance().store(group="hydra/launcher", name="slurm_schema", node=SlurmConf, provider="cyclevae")


class RefusedLauncher(submitit_launcher.SlurmLauncher):
    """What job.launch.refusal puts in the place of hydra/launcher=submitit_slurm and submitit_local."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from job.errors import UserError
        from job.launch.refusal import WHY

        raise UserError(WHY)


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """One SLURM job per sweep point, an array where there are several.

    Every point is `srun python -m job.train ...` in a batch step that requeues.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from job.launch.slurm.sweep import launch

        return launch(self.config, self.hydra_context, self.params, job_overrides)
