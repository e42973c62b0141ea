"""Prints the run directory of a command line and the directory of its metrics targets, for batch scripts: `python -m job.launch.where data.dir=... logging.run_name=...`.

Takes the arguments of job.train and refuses the same configurations, before any GPU is touched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from job.config import config_dir, validate
from job.launch.answer import answered
from job.launch.rundir import targets_directory


@hydra.main(config_path=str(config_dir()), config_name="mmdit_cycle_vae", version_base="1.3")
def show(values: DictConfig) -> None:
    """Print the two directories, a line each."""
    validate(OmegaConf.to_object(values))  # type: ignore[arg-type]
    print(Path(HydraConfig.get().runtime.output_dir).absolute())
    print(targets_directory(values))


if __name__ == "__main__":
    sys.exit(answered(show))
