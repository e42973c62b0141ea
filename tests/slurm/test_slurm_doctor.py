"""What `cyclevae doctor --slurm` says of a real cluster, and what a sweep on it ends with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from slurm_runs import ROOT, SMALL, Slurm

pytest_plugins = ["slurm_lab"]
pytestmark = pytest.mark.timeout(1200)


def run(slurm: Slurm, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=slurm.cluster.env | changes,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
    )


def test_a_cluster_that_is_well(slurm: Slurm) -> None:
    done = run(slurm, "job.doctor", "--slurm", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert {name for name, check in checks.items() if check["state"] == "trouble"} == set(), done.stdout
    assert done.returncode == 0, done.stderr
    assert checks["controller"]["state"] == checks["partitions"]["state"] == "well"
    assert checks["arrays"]["words"].startswith("2 points")


def test_a_controller_that_does_not_answer_and_tools_that_are_missing(slurm: Slurm) -> None:
    done = run(slurm, "job.doctor", "--slurm", SLURM_CONF="/nowhere/slurm.conf")
    assert done.returncode == 1
    assert "trouble  controller" in done.stdout
    done = run(slurm, "job.doctor", "--slurm", PATH="/nowhere")
    assert done.returncode == 1
    assert "trouble  SLURM's tools  sbatch, squeue, scancel, scontrol, srun not found" in done.stdout


def test_a_sweep_ends_with_its_comparison(slurm: Slurm) -> None:
    where = [f"logging.save_dir={slurm.directory}", "logging.run_name=compared", "training.seed=1,2"]
    short = [key for key in SMALL if not key.startswith(("training.num_train_steps", "training.warmup"))]
    launcher = ["hydra/launcher=slurm", "hydra.launcher.nodes=1", "hydra.launcher.tasks_per_node=1"]
    done = run(slurm, "job.train", "--multirun", *launcher, *short, "training.num_train_steps=4", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout[done.stdout.index("2 runs, 1 setting, 2 seeds; no key differs") :]
    assert [line.split()[:2] for line in told.splitlines()[3:5]] == [["1", "4"], ["2", "4"]]
    assert f"with plots: cyclevae compare {slurm.directory / 'compared'} --html compare.html" in told
