"""hydra/launcher=local: points of a sweep on this machine, several at a time (job.launch.local.sweep)."""

# Without `from __future__ import annotations`, which makes strings of annotations: dataclasses look their names up in
# sys.modules, and Hydra loads plugins without an entry there.
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.cyclevae_local.LocalLauncher"
    jobs: int = 2  # points at a time
    gpus: list[str] = field(default_factory=list)  # as CUDA_VISIBLE_DEVICES takes them, one for each point at a time
    dry_run: bool = False  # print the commands, start nothing


ConfigStore.instance().store(group="hydra/launcher", name="local_schema", node=LocalConf, provider="cyclevae")


class LocalLauncher(Launcher):
    """Every point is a process of `python -m job.train ...`."""

    def __init__(self, **params: Any) -> None:
        self.params = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from job.launch.local.sweep import launch

        return launch(self.config, self.hydra_context, self.params, job_overrides)
