"""Whole runs on a GPU, by the command that a user gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from job.runtime.checkpoint import open_checkpoint, read_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
SMALL = [
    *("data=synthetic", "model.hidden_size=64", "model.n_blocks=2", "model.n_heads=2", "model.head_dim=32"),
    *("model.cond_dim=64", "training.device=cuda", "training.train_batch_size=8", "training.eval_batch_size=8"),
    *("training.lr_schedule=constant", "training.warmup_steps=1", "logging.eval_freq=0", "logging.log_freq=5"),
    *("logging.num_eval_batches=1", "logging.num_samples=1"),
]
DETERMINISTIC = "training.deterministic=true"


def command(*arguments: str) -> None:
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", *arguments], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0


def train(run: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Weights at the end of a run."""
    command(
        *launcher, "job.train", *SMALL, *overrides, f"logging.save_dir={run.parent}", f"logging.run_name={run.name}"
    )
    return read_weights(open_checkpoint(run), "model.")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_twenty_steps_are_ten_and_a_stop_and_ten(tmp_path: Path, dtype: str) -> None:
    """Bit for bit in a deterministic run, checkpoints through pinned memory on the way."""
    keys = [f"training.dtype={dtype}", DETERMINISTIC]
    whole = train(tmp_path / "whole", *keys, "training.num_train_steps=20")
    train(tmp_path / "parts", *keys, "training.num_train_steps=10")
    parts = train(tmp_path / "parts", *keys, "training.num_train_steps=20")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nccl_of_one_rank(tmp_path: Path, strategy: str) -> None:
    torchrun = ("job.runtime.torchrun", "--standalone", "--nproc_per_node=1", "-m")
    train(tmp_path / "run", f"training.strategy={strategy}", "training.num_train_steps=3", launcher=torchrun)


def test_the_recipe_for_large_models(tmp_path: Path) -> None:
    recipe = ["training.dtype=bf16", "training.compile_model=true", "training.activation_checkpointing=true"]
    train(tmp_path / "run", *recipe, "training.num_train_steps=5")


def test_the_demo_from_data_to_samples(tmp_path: Path) -> None:
    """What `make train` does, with fewer texts and steps."""
    command("job.prepare", "--out", str(tmp_path / "data"), "--max-samples", "2000")
    overrides = [f"data.dir={tmp_path / 'data'}", f"logging.save_dir={tmp_path}", "training.num_train_steps=60"]
    command("job.train", "--config-name", "demo", *overrides, "logging.run_name=demo")
    assert (tmp_path / "demo/samples.txt").read_text()
