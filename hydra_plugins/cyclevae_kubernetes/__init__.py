"""hydra/launcher=kubernetes: one job per sweep point, a TrainJob or a PyTorchJob of Kubeflow's.

What it does is in job.launch.kubernetes.sweep.
"""

# Without `from __future__ import annotations`, which makes strings of annotations: dataclasses look their names up in
# sys.modules, and Hydra loads plugins without an entry there.
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from job.launch.kubernetes.settings import Settings


@dataclass
class KubernetesConf(Settings):
    _target_: str = "hydra_plugins.cyclevae_kubernetes.KubernetesLauncher"
    namespace: str | None = None  # null: the context's, else cyclevae
    context: str | None = None  # of the kubeconfig; null: the current one, or the pod's own cluster
    wait: bool = True  # stay until all runs have ended
    dry_run: bool = False  # print the manifests, send nothing


ConfigStore.instance().store(group="hydra/launcher", name="kubernetes_schema", node=KubernetesConf, provider="cyclevae")


class KubernetesLauncher(Launcher):
    """Every point is a job of `python -m job.train ...`, which the operator starts again when exit codes ask for it."""

    def __init__(self, **params: Any) -> None:
        self.params = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from job.launch.kubernetes.sweep import launch

        return launch(self.config, self.hydra_context, self.params, job_overrides)
