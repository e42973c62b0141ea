"""hydra/launcher=pytorchjob: one PyTorchJob of Kubeflow's training operator per sweep point. What it does is in job.launch.kubernetes.sweep."""

# No `from __future__ import annotations`: Hydra loads plugins past sys.modules, where dataclasses look up annotations that are strings.
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from job.launch.kubernetes import manifests


@dataclass
class PyTorchJobConf(manifests.Settings):
    _target_: str = "hydra_plugins.cyclevae_kubernetes.PyTorchJobLauncher"
    namespace: str | None = None  # null: the context's, else cyclevae
    context: str | None = None  # of the kubeconfig; null: the current one, or the pod's own cluster
    wait: bool = True  # stay until all runs have ended
    dry_run: bool = False  # print the manifests, send nothing


ConfigStore.instance().store(group="hydra/launcher", name="pytorchjob_schema", node=PyTorchJobConf, provider="cyclevae")


class PyTorchJobLauncher(Launcher):
    """Every point is a job of `python -m job.train ...` on its nodes, which the operator starts again when its exit code asks for it."""

    def __init__(self, **params: Any) -> None:
        self.params = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from job.launch.kubernetes.sweep import launch

        return launch(self.config, self.hydra_context, self.params, job_overrides, initial_job_idx)
