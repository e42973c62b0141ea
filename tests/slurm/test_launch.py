"""What is submitted, to the exact line, and what is read from run directories: no cluster needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job import slurm
from job.config import Config
from job.errors import UserError
from job.launch.slurm import scheduler, sweep
from job.launch.slurm.run_directory import RunDirectory, find_runs

ROOT = Path(__file__).parent.parent.parent
Script = Callable[..., str]


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """The job scripts that `cyclevae slurm submit --dry-run ARGUMENTS...` prints."""

    def dry_run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["cyclevae"])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(scheduler, "available", lambda: False)
        assert (
            slurm.main(
                [
                    "submit",
                    "--dry-run",
                    "data=synthetic",
                    f"logging.save_dir={tmp_path}/runs",
                    "logging.run_name=r",
                    *arguments,
                ]
            )
            == code
        )
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
        f"--label --kill-on-bad-exit=0 --wait=600 --cpus-per-task=6 {sys.executable} -m job.train --config-name mmdit_cycle_vae data=synthetic "
        f"logging.save_dir={tmp_path}/runs logging.run_name=r 'hydra.run.dir='\"'\"'{tmp_path}/runs/r'\"'\"'' ;;"
    ]


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
    assert text.index("trap ") < text.index("module load cuda") < text.index("case ")


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
        f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/runs:{tmp_path}/runs,{tmp_path}/runs/.targets:{tmp_path}/runs/.targets,/data:/data:ro "
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
        f"--label --kill-on-bad-exit=0 --wait=600 apptainer exec --bind {tmp_path}:{tmp_path},{tmp_path}/runs:{tmp_path}/runs,"
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
    ],
)
def test_mistakes_are_told_before_anything_is_queued(
    script: Script, arguments: list[str], code: int, words: str
) -> None:
    told = script(*arguments, code=code)
    assert words in told
    assert "Traceback" not in told


def test_the_launchers_do_not_import_torch() -> None:
    code = "import sys, job.slurm, job.launch.slurm.sweep, job.launch.slurm.submission, job.launch.where; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


LOG = """\
slurm: 2026-01-01 10:00:00 job 7, restart 0: started (2 nodes, 2 tasks)
1: error: of an earlier start
slurm: 2026-01-01 10:01:00 job 7, restart 1: started (2 nodes, 2 tasks)
0: step 1/80  loss 4.7
0: error: lost another rank: rank 1 on n2 gave up: CUDA error [connection closed]
1: Error executing job with overrides: ['model=small']
1: Traceback (most recent call last):
1: torch.AcceleratorError: CUDA error: device-side assert triggered
srun: error: n2: task 1: Exited with exit code 1
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    path = tmp_path / "runs" / "sweep" / "a=1"
    (path / "slurm").mkdir(parents=True)
    (path / "slurm" / "7.log").write_text(LOG)
    events = [
        {"time": 1, "job": "7", "restarts": 1, "event": "started", "reason": "", "exit_code": None},
        {"time": 2, "job": "7", "restarts": 1, "event": "failed", "reason": "exit code 1", "exit_code": 1},
    ]
    (path / "slurm" / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events) + '{"time": 3, "jo'
    )
    (path / "training_log.jsonl").write_text(
        '{"step": 20, "loss": 4.5, "tokens_per_second": 100.0, "step_seconds": 2.0}\n'
    )
    (path / "config.yaml").write_text("training: {num_train_steps: 80}\n")
    return RunDirectory(path)


def test_the_first_failing_rank_is_named_not_the_others(run: RunDirectory) -> None:
    assert run.first_failure("7") == "1: torch.AcceleratorError: CUDA error: device-side assert triggered"


def test_status_from_the_run_directory_alone(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scheduler, "available", lambda: False)
    assert find_runs(run.path.parent.parent) == [run]
    assert slurm.main(["status", "--json", str(run.path)]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert {
        name: status[name]
        for name in ("job", "state", "alive", "step", "steps", "loss", "seconds_left", "restarts", "reason")
    } == {
        "job": "7",
        "state": "FAILED",
        "alive": False,
        "step": 20,
        "steps": 80,
        "loss": 4.5,
        "seconds_left": 120,
        "restarts": 1,
        "reason": "exit code 1",
    }
    (run.path / "slurm" / "alive").touch()
    assert run.status({"7": "RUNNING"})["alive"]
    os.utime(run.path / "slurm" / "alive", (0, 0))
    assert not run.status({"7": "RUNNING"})["alive"]


def test_the_outcome_without_accounting(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ended", lambda _jobs: {})
    assert run.outcome("7") == "FAILED (exit code 1)"
    assert run.outcome("8") == "ended without a word (never started) (exit code )"


def test_the_outcome_where_accounting_lags(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ended", lambda _jobs: {"7": ("PREEMPTED", "0:0"), "8": ("TIMEOUT", "0:0")})
    assert run.outcome("7") == "FAILED (exit code 1)"
    assert run.outcome("8") == "TIMEOUT (exit code 0:0)"


def test_restarts_are_counted_from_the_last_new_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    script = f"""
        scontrol() {{ if [ "$1" = requeue ]; then echo requeued; fi >&2; }}
        SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1
        source {ROOT}/job/launch/slurm/batch.sh
        run_dir={run} notes={run}/slurm max_restarts=2
        for checkpoint in none step_00000010 step_00000010 .step_00000020.tmp step_00000020; do
            mkdir -p {run}/checkpoints/$checkpoint
            requeue "exit code 134" 134
        done"""
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    events = [json.loads(line) for line in (run / "slurm" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["requeued", "requeued", "requeued", "failed", "requeued"]
    assert events[3]["reason"] == "exit code 134; not requeued: 2 restarts without a new checkpoint, max_restarts=2"
    assert events[4]["reason"] == "exit code 134; restart 1 of at most 2 from checkpoint step_00000020"


def test_a_run_has_one_job_at_a_time(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["cyclevae"])
    monkeypatch.setattr(scheduler, "available", lambda: False)
    monkeypatch.setattr(scheduler, "queued", lambda: {"7": "RUNNING"})
    where = [f"logging.save_dir={run.path.parent}", f"logging.run_name='{run.path.name}'"]
    assert slurm.main(["submit", "data=synthetic", *where]) == 1
    assert f"error: {run.path} is being trained by job 7" in capsys.readouterr().err


def test_waiting_ends_when_no_run_is_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that restarts is asked again, a job between two lives is not over, and another job of the user does not matter."""
    answers: list[dict[str, str]] = [
        {},
        {"7": "RUNNING"},
        {"9": "RUNNING"},
        {"7": "RUNNING"},
        {"9": "RUNNING"},
        {"9": "RUNNING"},
    ]

    def queued() -> dict[str, str]:
        answer = answers.pop(0)
        if not answer:
            raise UserError("squeue: no answer")
        return answer

    monkeypatch.setattr(scheduler, "queued", queued)
    monkeypatch.setattr(scheduler, "ended", lambda _jobs: {"7": ("COMPLETED", "0:0")})
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    point = sweep.Point(tmp_path, tmp_path, "a=1", [], Config())
    assert sweep.wait({"7": point}) == {"7": (point, "COMPLETED")}
    assert answers == []


def test_what_a_job_is_submitted_from_does_not_shape_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a surrounding job's variables nor the site's defaults for what was asked for."""
    for name in ("SLURM_NTASKS", "SLURM_CONF", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_TIMELIMIT"):
        monkeypatch.setenv(name, "1")
    executor = sweep.Executor(folder=tmp_path)
    executor.parameters = {"partition": "gpu", "time": 5}
    *env, sbatch, _ = executor._make_submission_command(Path("script.sh"))
    left = subprocess.run([*env, "env"], capture_output=True, text=True, check=True).stdout
    assert sbatch == "sbatch"
    assert {line.split("=")[0] for line in left.splitlines() if line.startswith(("SLURM", "SBATCH"))} == {
        "SLURM_CONF",
        "SBATCH_ACCOUNT",
    }
