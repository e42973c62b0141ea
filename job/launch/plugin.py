"""What our launcher plugins of Hydra share: they keep what Hydra gives them until it calls `launch`."""

from __future__ import annotations

from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SweepLauncher(Launcher):
    """A launcher with its values of hydra.launcher in `params`. A plugin adds `launch`."""

    def __init__(self, **params: Any) -> None:
        self.params = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra knows of the sweep."""
        self.hydra_context, self.config = hydra_context, config
