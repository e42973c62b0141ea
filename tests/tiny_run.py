"""A small run on prepared text, for tests of what one does with a trained model."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from job.config import Config, config_dir
from job.errors import ExitCode
from job.train import train

TINY = [
    "model.hidden_size=32",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.head_dim=16",
    "model.cond_dim=32",
    "model.max_seq_len=32",
    "training.device=cpu",
    "training.num_train_steps=6",
    "training.warmup_steps=2",
    "training.train_batch_size=16",
    "training.eval_batch_size=16",
    "optimizer.lr=0.003",
    "logging.num_eval_batches=2",
    "logging.log_freq=2",
    "monitoring.enabled=false",
]


def configured(*overrides: str) -> Config:
    """A configuration of a tiny model; later overrides win."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_object(compose("mmdit_cycle_vae", [*TINY, *overrides]))  # type: ignore[return-value]


def tiny_run(run: Path, data: Path, *overrides: str) -> Path:
    """Train a run of a directory to its end on prepared data."""
    assert train(configured(f"data.dir={data}", *overrides), run) == ExitCode.FINISHED
    return run
