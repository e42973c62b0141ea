"""`cyclevae LAUNCHER submit` as its usage says: options of job.train wherever they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job import k8s, slurm
from job.command import overrides_and_options
from job.launch.slurm import scheduler

COMMANDS = {"slurm": slurm.main, "k8s": k8s.main}
NEEDED = {"slurm": [], "k8s": ["hydra.launcher.container.image=image:1"]}
OVERRIDES = ["training.device=cpu", "logging.run_name=r", "logging.save_dir=runs"]


@pytest.mark.parametrize("launcher", COMMANDS)
@pytest.mark.parametrize(
    "arrange",
    [
        lambda overrides: ["--config-name", "demo", *overrides],
        lambda overrides: [*overrides, "--config-name", "demo"],
        lambda overrides: [overrides[0], "--config-name=demo", *overrides[1:]],
        lambda overrides: [overrides[0], "-cn", "demo", *overrides[1:]],
    ],
    ids=["first", "last", "between", "short"],
)
def test_a_configuration_is_chosen_anywhere(
    launcher: str,
    arrange: Callable[[list[str]], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("sys.argv", ["cyclevae"])
    monkeypatch.setattr(scheduler, "available", lambda: False)
    monkeypatch.chdir(tmp_path)
    code = COMMANDS[launcher](["submit", "--dry-run", *arrange([*OVERRIDES, *NEEDED[launcher]])])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert "--config-name" in told.out
    assert "demo" in told.out
    assert "training.device=cpu" in told.out


def test_overrides_come_in_one_piece() -> None:
    mixed = ["a=1", "--config-name", "demo", "b=2", "--multirun", "c=3", "--info", "-cd", "mine", "--cfg", "job", "~d"]
    options = ["--config-name", "demo", "--multirun", "--info", "-cd", "mine", "--cfg", "job"]
    assert overrides_and_options(mixed) == (["a=1", "b=2", "c=3", "~d"], options)
    assert overrides_and_options(["--info", "searchpath", "a=1"]) == (["a=1"], ["--info", "searchpath"])
    assert overrides_and_options(["a=1", "--config-name"]) == (["a=1"], ["--config-name"])
    assert overrides_and_options([]) == ([], [])


def test_job_train_takes_overrides_on_both_sides_of_an_option() -> None:
    arguments = ["training.seed=3", "--config-name", "demo", "data.dir=mine", "--cfg", "job"]
    done = subprocess.run([sys.executable, "-m", "job.train", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"  seed: 3", "  dir: mine", "  run_name: demo"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize("launcher", ["submitit_slurm", "submitit_local"])
def test_submitits_launchers_are_refused(launcher: str, tmp_path: Path) -> None:
    """Also with keys of theirs: a failure of a rank would end with exit code 0."""
    arguments = [f"hydra/launcher={launcher}", "hydra.launcher.timeout_min=5", "data=synthetic", "training.seed=1,2"]
    done = subprocess.run(
        [sys.executable, "-m", "job.train", "--multirun", *arguments, f"logging.save_dir={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "on SLURM use hydra/launcher=slurm" in done.stderr
    assert "Traceback" not in done.stderr


def test_launching_needs_no_torch(tmp_path: Path) -> None:
    """Neither by `submit` nor by job.train, which trains with it: sweeps are sent from machines that have none."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here')")
    sweep = ["--multirun", "hydra/launcher=trainjob", "hydra.launcher.dry_run=true", "hydra.launcher.kind=trainjob"]
    command = [sys.executable, "-m", "job.train", *sweep, "data=synthetic", "training.seed=1,2"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kind: TrainJob\n") == 2
    wrong = subprocess.run([*command, "training.seeds=1"], env=environment, capture_output=True, text=True, timeout=100)
    assert (wrong.returncode, "did you mean training.seed" in wrong.stderr) == (2, True), wrong.stderr
    assert "Traceback" not in wrong.stderr
