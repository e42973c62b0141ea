"""Launchers that other packages bring along and that would not tell of runs that fail."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, flag_override

SUBMITIT = "hydra_plugins.hydra_submitit_launcher."  # hydra/launcher=submitit_slurm and submitit_local
REFUSED = "hydra_plugins.cyclevae_slurm.RefusedLauncher"
WHY = (
    "hydra/launcher=submitit_slurm and submitit_local do not tell of runs that fail; on SLURM use "
    "hydra/launcher=slurm, on this machine --multirun without hydra/launcher"
)


class RefuseSubmitit(Callback):
    """Puts our refusal in the place of submitit's launchers: an exception here would only become Hydra's warning.

    Their jobs keep a rank's exception to themselves: exit code 0, COMPLETED, and the error in no file.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        launcher = config.hydra.launcher
        if launcher["_target_"].startswith(SUBMITIT):
            with flag_override(launcher, ["readonly", "struct"], False):
                launcher["_target_"] = REFUSED
