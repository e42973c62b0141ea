from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from job import train as main_job
from job.command import guarded
from job.config import Config, config_dir, from_dict
from job.data.shards import ShardDataset, shard_file
from job.errors import ExitCode, UserError
from job.train import train
from job.trained import load_trained

TINY = [
    "data=synthetic",
    "model.hidden_size=32",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.head_dim=16",
    "model.cond_dim=32",
    "training.device=cpu",
    "training.num_train_steps=4",
    "training.train_batch_size=4",
    "training.eval_batch_size=8",
    "logging.num_eval_batches=1",
    "logging.log_freq=2",
]


def configured(*overrides: str) -> Config:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_object(compose("mmdit_cycle_vae", [*TINY, *overrides]))  # type: ignore[return-value]


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(configured(), run) == ExitCode.FINISHED
    return run


def test_a_run_directory_holds_what_the_readme_lists(finished: Path) -> None:
    for name in (
        "config.yaml",
        "environment.json",
        "training_log.jsonl",
        "evaluation.jsonl",
        "curves.png",
        "samples.txt",
        "result.json",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert [path.name for path in (finished / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert from_dict(OmegaConf.to_container(OmegaConf.load(finished / "config.yaml"))) == configured()  # type: ignore[arg-type]
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_log_holds_numbers_only_a_line_per_interval(finished: Path) -> None:
    lines = log_of(finished)
    assert [line["step"] for line in lines] == [2, 4]
    named = {
        "step",
        "epoch",
        "lr",
        "loss",
        "base_l2t_text_loss",
        "base_t2l_latent_loss",
        "cycle_text_loss",
        "cycle_latent_loss",
        "cycle_text_weight",
        "cycle_latent_weight",
        "grad_norm",
        "t_lat_mean",
        "latent_pred_norm",
        "x0_pred_norm",
        "tokens_per_second",
        "step_seconds",
        "data_wait_seconds",
        "nonfinite_steps",
    }
    for line in lines:
        assert named <= set(line)
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in line.values())
        weighted = (
            line["base_l2t_text_loss"]
            + 0.1 * line["base_t2l_latent_loss"]
            + line["cycle_text_weight"] * line["cycle_text_loss"]
            + line["cycle_latent_weight"] * line["cycle_latent_loss"]
        )
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)


def test_a_finished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "training_log.jsonl").read_text()
    assert train(configured(), finished) == ExitCode.FINISHED
    assert "finished" in capsys.readouterr().out
    assert (finished / "training_log.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["training.seed=7"],
            ["training.seed: 42 -> 7", "training.allow_changed=[training.seed"],
        ),  # synthetic data changes with the seed
        (["model.hidden_size=48", "loss.latent_loss_weight=0.5"], ["model.hidden_size", "loss.latent_loss_weight"]),
        (["training.train_batch_size=8"], ["global_batch_size: 4 -> 8", "go on with training.global_batch_size=4, "]),
        (["training.resume=never"], ["training.resume=never", "logging.run_name"]),
    ],
)
def test_another_run_in_the_same_directory_is_refused(finished: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        train(configured(*overrides), finished)
    for word in words:
        assert word in str(refused.value)


def test_a_change_can_be_allowed_by_name(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "longer"
    longer = configured(
        "training.num_train_steps=6", "training.allow_changed=[training.num_train_steps]", f"training.resume={finished}"
    )
    assert train(longer, run) == ExitCode.FINISHED
    assert [line["step"] for line in log_of(run)] == [6]


def poisoned(prepared: Path, directory: Path, row: int) -> ShardDataset:
    """A copy of a dataset in which one latent of the training split is not finite."""
    directory.mkdir()
    for path in prepared.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    path = directory / shard_file("train", 0, "latents")
    latents = np.load(path)
    latents[row] = np.nan
    np.save(path, latents)
    return ShardDataset(directory, "train")


def on_data(directory: Path, *overrides: str) -> Config:
    return configured(
        "data=shards",
        f"data.dir={directory}",
        "model.max_seq_len=64",
        "training.num_train_steps=8",
        "training.train_batch_size=64",
        *overrides,
    )


def test_a_bad_sample_skips_its_step_and_nothing_else(prepared: Path, tmp_path: Path) -> None:
    data = poisoned(prepared, tmp_path / "data", row=3)
    steps = -(-len(data) // 64)  # one epoch, and the sample is in exactly one of its batches
    assert (
        train(
            on_data(
                tmp_path / "data", f"training.num_train_steps={steps}", "logging.log_freq=1", "training.ema_decay=0.5"
            ),
            tmp_path / "run",
        )
        == ExitCode.FINISHED
    )
    lines = log_of(tmp_path / "run")
    assert lines[-1]["nonfinite_steps"] in (1, 2)  # the last batch reaches into the next epoch
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(tensor.isfinite().all() for tensor in load_trained(tmp_path / "run").weights.values())


def test_bad_steps_in_a_row_end_the_run_by_name(prepared: Path, tmp_path: Path) -> None:
    data = poisoned(prepared, tmp_path / "data", row=3)
    config = on_data(tmp_path / "data", f"training.train_batch_size={len(data)}", "training.max_nonfinite_steps=2")
    with pytest.raises(UserError) as stopped:
        train(config, tmp_path / "run")
    for word in (
        "2 steps in a row",
        "step 1",
        "base_t2l_latent_loss",
        "cycle_latent_loss",
        "first bad gradient",
        "training samples",
        "there is no checkpoint",
    ):
        assert word in str(stopped.value)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    config.logging.save_freq = 1
    with pytest.raises(UserError, match="the last checkpoint, of step 1, is not from before; save less often"):
        train(config, tmp_path / "saved")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["loss.loss_typ=l2t"], ExitCode.USAGE, "did you mean loss.loss_type"),
        (["lr=0.1"], ExitCode.USAGE, "did you mean optimizer.lr?"),
        (["data.token_dir=x"], ExitCode.USAGE, "job.convert data"),
        (["tokenizer.path=x"], ExitCode.USAGE, "job.prepare --tokenizer"),
        (["+loss.foo=1"], ExitCode.USAGE, "unknown configuration key loss.foo"),
        (["loss=vae"], ExitCode.USAGE, "choose one of cycle_vae"),
        (["model.hidden_size=wide"], ExitCode.USAGE, "could not be converted to Integer"),
        (["--config-name", "nothing"], ExitCode.USAGE, "nothing"),
        (["data.dir=/nowhere"], ExitCode.FAILED, "python -m job.prepare"),
        (
            ["data=synthetic", "training.train_batch_size=3", "training.global_batch_size=8"],
            ExitCode.FAILED,
            "not a multiple",
        ),
        (["data=synthetic", "training.device=cuda"], ExitCode.FAILED, "training.device=cpu"),
        (["data=synthetic", "training.resume=/nowhere"], ExitCode.FAILED, "/nowhere"),
        (["data=synthetic", "training.init_from=/nowhere"], ExitCode.FAILED, "/nowhere"),
        (["data=synthetic", "model.latent_dim=7"], ExitCode.FAILED, "model.latent_dim=7"),
        (["data=synthetic", "model.vocab_size=7"], ExitCode.FAILED, "model.vocab_size=7"),
        (["data=synthetic", "monitoring.host=192.0.2.1"], ExitCode.FAILED, "monitoring.host=192.0.2.1"),
        (["data=synthetic", "logging.run_name="], ExitCode.USAGE, "logging.run_name=: give a name"),
        (["data=synthetic", "logging.save_dir="], ExitCode.USAGE, "logging.save_dir is empty: give"),
        (
            ["data=synthetic", "logging.save_dir=s3://b/r"],
            ExitCode.USAGE,
            "logging.save_dir=s3://b/r: runs are written",
        ),
        (["data=synthetic", "logging.run_name=../x"], ExitCode.USAGE, "logging.run_name=../x: give a name"),
        (["data.dir=/a=b"], ExitCode.USAGE, """'data.dir="/a=b"'"""),
        (["loss=sequential", "training.sequential_schedule=[{type: l2t}]"], ExitCode.USAGE, "steps"),
        (["data=synthetic", "training.compile_model=true"], ExitCode.FAILED, "no-compiler is not installed"),
    ],
)
def test_a_users_mistake_is_one_line_and_an_exit_code(
    arguments: list[str],
    code: ExitCode,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["train", f"logging.save_dir={tmp_path}", *arguments])
    monkeypatch.setattr(main_job, "failures", [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-compiler")
    assert guarded(main_job.main) == code
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert words in printed.err
    assert "Traceback" not in printed.err + printed.out


def in_a_process(redirection: str, directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`python -m job.train` as its users run it, its output redirected."""
    words = shlex.join([sys.executable, "-m", "job.train", *TINY, "training.warmup_steps=0", *overrides])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{words} logging.save_dir={directory} {redirection}"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", ">&- 2>&-", "| true"])
def test_a_run_whose_only_failure_is_a_print_is_finished(redirection: str, tmp_path: Path) -> None:
    done = in_a_process(redirection, tmp_path, 'logging.run_name="ä"')
    assert (done.returncode, done.stderr) == (ExitCode.FINISHED, "")
    assert (tmp_path / "ä" / "result.json").exists()


@pytest.mark.parametrize("name", ["checkpoints", "config.yaml", "training_log.jsonl", "curves.png", "result.json"])
def test_what_is_in_the_way_of_a_file_or_directory_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start and at the end of a run."""
    (tmp_path / "run").mkdir()
    if name == "checkpoints":
        (tmp_path / "run" / name).touch()
    else:
        (tmp_path / "run" / name / "x").mkdir(parents=True)
    run = ["training.warmup_steps=0", "logging.run_name=run", f"logging.save_dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["train", *TINY, *run])
    monkeypatch.setattr(main_job, "failures", [])
    assert guarded(main_job.main) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"{tmp_path}/run/{name}: is a " in said


def test_a_full_disk_at_the_start_is_one_line(tmp_path: Path) -> None:
    words = shlex.join([sys.executable, "-m", "job.train", *TINY, f"hydra.run.dir={tmp_path}/b"])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 1; {words}"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == ExitCode.FAILED
    assert done.stderr == f"error: {tmp_path}/b/config.yaml: File too large\n"


def test_points_of_a_sweep_are_named_after_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the values would make a name that no file system takes."""
    directories: list[Path] = []

    def note(_config: Config, run_dir: Path, _started: float) -> ExitCode:
        directories.append(run_dir)
        return ExitCode.FINISHED

    monkeypatch.setattr(main_job, "train", note)
    long = [f"/data/{'x' * 300}/{number}" for number in (1, 2)]
    for sweep in ("training.seed=1,2", f"training.init_from={','.join(long)}"):
        monkeypatch.setattr(
            "sys.argv", ["train", "--multirun", *TINY, f"logging.save_dir={tmp_path}", "logging.run_name=s", sweep]
        )
        assert guarded(main_job.main) == ExitCode.FINISHED
    assert {path.parent for path in directories} == {tmp_path / "s"}
    short, long = [path.name for path in directories[:2]], [path.name for path in directories[2:]]
    assert short == ["training.seed=1", "training.seed=2"]
    assert [(name[:29], len(name)) for name in long] == [("training.init_from=_data_xxxx", 150)] * 2
    assert len(set(long)) == 2


def test_a_sweep_that_is_told_to_stop_starts_no_further_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Path] = []

    def stopped(_config: Config, run_dir: Path, _started: float) -> ExitCode:
        started.append(run_dir)
        monkeypatch.setattr(main_job.signals, "_first", (signal.SIGINT, 0.0))
        return ExitCode.STOPPED

    monkeypatch.setattr(main_job, "train", stopped)
    monkeypatch.setattr(main_job, "outcomes", [])
    monkeypatch.setattr("sys.argv", ["train", "--multirun", *TINY, f"logging.save_dir={tmp_path}", "training.seed=1,2"])
    assert guarded(main_job.main) == ExitCode.STOPPED
    assert [path.name for path in started] == ["training.seed=1"]
    assert "training.seed=2" in capsys.readouterr().out


def test_no_watchdog_outlives_its_run(finished: Path) -> None:
    """In a sweep without a cluster it would end the process in the middle of the next run."""
    assert (finished / "result.json").exists()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
