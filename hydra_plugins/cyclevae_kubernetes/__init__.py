"""hydra/launcher=kubernetes: one job per sweep point, a TrainJob or a PyTorchJob of Kubeflow's.

What it does is in job.launch.kubernetes.sweep.
"""

# Without `from __future__ import annotations`, which makes strings of annotations: dataclasses look their names up in
# sys.modules, and Hydra loads plugins without an entry there.
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn

# As a module: Hydra takes every launcher class that is a name in a plugin for one that the plugin offers.
from job.launch import plugin
from job.launch.kubernetes.settings import Settings


@dataclass
class KubernetesConf(Settings):
    _target_: str = "hydra_plugins.cyclevae_kubernetes.KubernetesLauncher"
    namespace: str | None = None  # null: the context's, else cyclevae
    context: str | None = None  # of the kubeconfig; null: the current one, or the pod's own cluster
    wait: bool = True  # stay until all runs have ended
    dry_run: bool = False  # print the manifests, send nothing


ConfigStore.instance().store(group="hydra/launcher", name="kubernetes_schema", node=KubernetesConf, provider="cyclevae")


class KubernetesLauncher(plugin.SweepLauncher):
    """Every point is a job of `python -m job.train ...`, which the operator starts again when exit codes ask for it."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from job.launch.kubernetes.sweep import launch

        return launch(self.config, self.hydra_context, self.params, job_overrides)
