"""hydra/launcher=local: points of a sweep on this machine, several at a time (job.launch.local.sweep)."""

# Without `from __future__ import annotations`, which makes strings of annotations: dataclasses look their names up in
# sys.modules, and Hydra loads plugins without an entry there.
from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn

# As a module: Hydra takes every launcher class that is a name in a plugin for one that the plugin offers.
from job.launch import plugin


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.cyclevae_local.LocalLauncher"
    jobs: int = 2  # points at a time
    gpus: list[str] = field(default_factory=list)  # as CUDA_VISIBLE_DEVICES takes them, one for each point at a time
    dry_run: bool = False  # print the commands, start nothing


ConfigStore.instance().store(group="hydra/launcher", name="local_schema", node=LocalConf, provider="cyclevae")


class LocalLauncher(plugin.SweepLauncher):
    """Every point is a process of `python -m job.train ...`."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from job.launch.local.sweep import launch

        return launch(self.config, self.hydra_context, self.params, job_overrides)
