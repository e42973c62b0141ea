"""What is submitted to SLURM, to the exact line: no cluster needed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job import slurm
from job.command import composed
from job.launch.slurm import scheduler
from job.launch.slurm.job_script import Executor

Script = Callable[..., str]


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """The job scripts that `cyclevae slurm submit --dry-run ARGUMENTS...` prints."""

    def dry_run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["cyclevae"])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(scheduler, "available", lambda: False)
        where = [f"logging.save_dir={tmp_path}/runs", "logging.run_name=r"]
        assert slurm.main(["submit", "--dry-run", "data=synthetic", *where, *arguments]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return dry_run


def sruns(script: str) -> list[str]:
    return [line.split("srun ", 1)[1] for line in script.splitlines() if re.match(r"\d+\) supervise", line)]


def test_one_task_per_gpu_and_all_gpus_visible_to_each(script: Script, tmp_path: Path) -> None:
    text = script(
        "hydra.launcher.nodes=2",
        "hydra.launcher.gpus_per_node=8",
        "hydra.launcher.cpus_per_task=6",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.timeout_min=90",
        "+hydra.launcher.additional_parameters.reservation=maintenance",
    )
    directives = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert directives == {
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=6",
        "partition=gpu",
        "time=90",
        "reservation=maintenance",
        "job-name=r",
        "requeue",
        "signal=B:USR1@180",
        "open-mode=append",
        f"output={tmp_path}/runs/r/.submitit/%j_0_log.out",
    }
    assert sruns(text) == [
        f"--label --kill-on-bad-exit=0 --wait=600 --cpus-per-task=6 {sys.executable} -m job.train "
        f"--config-name mmdit_cycle_vae data=synthetic logging.save_dir={tmp_path}/runs logging.run_name=r "
        f"'hydra.run.dir='\"'\"'{tmp_path}/runs/r'\"'\"'' ;;"
    ]


def test_data_of_a_store_reaches_the_ranks(script: Script) -> None:
    (line,) = sruns(script("data=shards", "data.dir=s3://bucket/mine", "data.cache_dir=/local/cache"))
    overrides = [word for word in shlex.split(line.removesuffix(";;")) if word.startswith("data")]
    data = composed("mmdit_cycle_vae", overrides).data  # Hydra writes the colon its own way
    assert (data.dir, data.cache_dir) == ("s3://bucket/mine", "/local/cache")
    refused = script("data=shards", "data.dir=s3://bucket/mine", code=1)
    assert refused.startswith("error: data.dir=s3://bucket/mine is copied to each node; set data.cache_dir")


def test_a_sweep_is_an_array_named_after_what_varies(script: Script, tmp_path: Path) -> None:
    text = script("loss.cycle_text_weight=0.05,0.1,0.2", "training.seed=1")
    assert "#SBATCH --array=0-2%3" in text
    directories = re.findall(r"supervise (\S+) ", text)
    assert directories == [f"{tmp_path}/runs/r/loss.cycle_text_weight={weight}" for weight in ("0.05", "0.1", "0.2")]
    assert "loss.cycle_text_weight=0.2 training.seed=1" in sruns(text)[2]
    assert "hydra.job." not in text
    long = re.findall(
        r"supervise (\S+) ", script(f"training.init_from={','.join('/data/' + number * 300 for number in '12')}")
    )
    assert [len(directory.removeprefix(f"{tmp_path}/runs/r/")) for directory in long] == [150, 150]


def test_scripts_are_valid_bash(script: Script, tmp_path: Path) -> None:
    text = script("loss.cycle_text_weight=0.05,0.1", "hydra.launcher.setup=['module load cuda']")
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    assert text.index("trap ") < text.index("module load cuda") < text.index("\ncase ")


def test_pyxis(script: Script, tmp_path: Path) -> None:
    text = script(
        "hydra/launcher=slurm_pyxis",
        'hydra.launcher.container.image="registry.example#team/app:1"',
        "hydra.launcher.container.mounts=[/data:/data:ro]",
        "+hydra.launcher.container.env.NCCL_DEBUG=INFO",
        "+hydra.launcher.container.env.LIST='a,b'",
        "hydra.launcher.container.options=[--no-container-remap-root]",
    )
    assert sruns(text)[0].startswith(
        f"--label --kill-on-bad-exit=0 --wait=600 '--container-image=registry.example#team/app:1' "
        f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/runs:{tmp_path}/runs,"
        f"{tmp_path}/runs/.targets:{tmp_path}/runs/.targets,/data:/data:ro "
        f"--container-workdir={tmp_path} --container-env=NCCL_DEBUG,LIST --no-container-remap-root python -m job.train "
    )
    assert "export NCCL_DEBUG=INFO\nexport LIST=a,b\n" in text


def test_apptainer(script: Script, tmp_path: Path) -> None:
    text = script(
        "hydra/launcher=slurm_apptainer",
        "hydra.launcher.container.image=app.sif",
        "+hydra.launcher.container.env.NCCL_DEBUG=INFO",
    )
    assert sruns(text)[0].startswith(
        "--label --kill-on-bad-exit=0 --wait=600 apptainer exec "
        f"--bind {tmp_path}:{tmp_path},{tmp_path}/runs:{tmp_path}/runs,"
        f"{tmp_path}/runs/.targets:{tmp_path}/runs/.targets --pwd {tmp_path} --nv app.sif python -m job.train "
    )
    assert "export APPTAINERENV_NCCL_DEBUG=INFO\n" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["loss.cycle_text_weigh=1"], 2, "did you mean loss.cycle_text_weight"),
        (["hydra.launcher.gpu=1"], 2, "gpu"),
        (["training.num_train_steps=-1,5"], 1, "training.num_train_steps=-1"),
        (["training.seed=1,1"], 1, "two points"),
        (["hydra/launcher=slurm_pyxis"], 1, "hydra.launcher.container.image"),
        (["hydra.launcher.container.image=x.sif"], 1, "add hydra/launcher=slurm_pyxis"),
        (
            ["hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=8", "training.global_batch_size=24"],
            1,
            "on 2 nodes of 8: training.global_batch_size=24 is not a multiple",
        ),
        (["hydra.launcher.timeout_min=3"], 1, "signal_delay_s=180 is not below"),
        (["hydra.launcher.timeout_min=5", "+hydra.launcher.additional_parameters.signal=B:USR1@300"], 1, "300"),
        (["logging.run_name=a%j"], 1, "a%j/.submitit: sbatch takes %"),
        ([r"logging.run_name='a\\b'"], 1, "sbatch takes %"),
        (["hydra/launcher=submitit_slurm"], 1, "use hydra/launcher=slurm"),
    ],
)
def test_mistakes_are_told_before_anything_is_queued(
    script: Script, arguments: list[str], code: int, words: str
) -> None:
    told = script(*arguments, code=code)
    assert words in told
    assert "Traceback" not in told


def test_bad_nodes_may_be_kept(script: Script) -> None:
    assert "\nCYCLEVAE_EXCLUDE_BAD_NODES=1\n" in script()
    assert "\nCYCLEVAE_EXCLUDE_BAD_NODES=0\n" in script("hydra.launcher.exclude_bad_nodes=false")


def test_no_requeue(script: Script) -> None:
    """submitit would write --requeue=False."""
    text = script("+hydra.launcher.additional_parameters.requeue=false")
    assert "#SBATCH --no-requeue\n" in text
    assert "--requeue" not in text.replace("--no-requeue", "")


def test_what_a_job_is_submitted_from_does_not_shape_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a surrounding job's variables nor the site's defaults for what was asked for."""
    for name in ("SLURM_NTASKS", "SLURM_CONF", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_TIMELIMIT"):
        monkeypatch.setenv(name, "1")
    executor = Executor(folder=tmp_path)
    executor.parameters = {"partition": "gpu", "time": 5}
    *env, sbatch, _ = executor._make_submission_command(Path("script.sh"))
    left = subprocess.run([*env, "env"], capture_output=True, text=True, check=True).stdout
    assert sbatch == "sbatch"
    assert {line.split("=")[0] for line in left.splitlines() if line.startswith(("SLURM", "SBATCH"))} == {
        "SLURM_CONF",
        "SBATCH_ACCOUNT",
    }
