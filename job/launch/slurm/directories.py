"""For slurm/train.sbatch: prints the run directory that job.train's arguments mean, and that of its metrics targets.

    python -m job.launch.slurm.directories OVERRIDES...
    cyclevae run /home/me/runs/first
    cyclevae targets /home/me/runs/.targets

The batch step needs both before the ranks start. Configurations that job.train would refuse are refused here already,
before any GPU is touched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from job.command import guarded
from job.config import Config, config_dir, targets_dir
from job.config_checks import validate


@hydra.main(config_path=str(config_dir()), config_name="mmdit_cycle_vae", version_base="1.3")
def show(values: DictConfig) -> None:
    """Print the two directories, a line each, marked: a site's prolog prints to standard output as well."""
    config: Config = OmegaConf.to_object(values)  # type: ignore[assignment]
    validate(config)
    print(f"cyclevae run {Path(HydraConfig.get().runtime.output_dir).absolute()}")
    print(f"cyclevae targets {targets_dir(config)}")


if __name__ == "__main__":
    sys.exit(guarded(show))
