"""TensorBoard, Weights & Biases and MLflow hold what the logs hold, and none of them can end a run.

Those of the real packages, offline, are skipped where a package is not installed (make test-trackers installs them in
an environment of their own).
"""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import configured

from job.config import Config
from job.errors import ExitCode, UserError
from job.files import json_lines
from job.monitoring import trackers
from job.monitoring.trackers import Trackers, refuse_missing_packages
from job.runtime import checkpointer
from job.train import train

SAMPLES = [{"text": "a <b>", "l2t": None, "t2l2t": "a c"}]


class Killed(BaseException):
    """The end of a process, as far as its files are concerned."""


def killed_and_resumed(config: Config, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed after its 4th step, whose checkpoint is of the second, and goes on."""
    save = checkpointer.Checkpointer.save

    def killed_at_4(self: checkpointer.Checkpointer, step: int, *arguments: object, **keywords: object) -> None:
        if step == 4:
            raise Killed
        save(self, step, *arguments, **(keywords | {"blocking": True}))  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer.Checkpointer, "save", killed_at_4)
        with pytest.raises(Killed):
            train(config, run)
    assert train(config, run) == ExitCode.FINISHED


def tracked(data: Path, key: str) -> Config:
    return configured(
        f"data.dir={data}",
        f"{key}=true",
        "logging.log_freq=1",
        "logging.save_freq=2",
        "logging.eval_freq=4",
        "logging.num_samples=2",
    )


def test_mlflow_goes_on_with_its_run(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs MLflow: make test-trackers")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)  # artifacts lie beside its database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = tmp_path / "runs" / "demo"
    killed_and_resumed(tracked(prepared, "logging.mlflow"), run, monkeypatch)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("cyclevae")
    (there,) = client.search_runs([experiment.experiment_id])
    assert there.info.status == "FINISHED"
    assert there.data.params["model.hidden_size"] == "32"
    for key, log in (("loss", "training_log.jsonl"), ("t2l/x0_cos_t0.9", "evaluation.jsonl")):
        kept = {metric.step: metric.value for metric in client.get_metric_history(there.info.run_id, key)}
        logged = {line["step"]: line[key.replace("_t0", "@0")] for line in json_lines(run / log)}
        assert kept == pytest.approx(logged)
    names = [entry.path for entry in client.list_artifacts(there.info.run_id, "samples")]
    assert names == ["samples/step_00000004.txt", "samples/step_00000006.txt"]
    text = Path(client.download_artifacts(there.info.run_id, names[-1])).read_text()
    assert json_lines(run / "samples.jsonl")[-1]["samples"][0]["text"] in text


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a file of wandb: after a header of 7 bytes LevelDB's log format, in blocks of 32 KiB.

    A part of a record begins with a checksum of four bytes, its length and its kind: 1 whole, 2 first, 4 last.
    """
    place, record = 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:  # too little for another part
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_records(run: Path) -> list[tuple[str, dict[str, Any]]]:
    """The id of the run, and the values, of every line that was written for Weights & Biases."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            items = wandb_internal_pb2.Record.FromString(data).history.item
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            if values:
                found.append((path.stem.removeprefix("run-"), values))
    return found


def test_weights_and_biases_goes_on_with_its_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs wandb: make test-trackers")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "runs" / "demo"
    killed_and_resumed(tracked(prepared, "logging.wandb"), run, monkeypatch)
    records = wandb_records(run)
    assert {run_id for run_id, _ in records} == {json.loads((run / "trackers.json").read_text())["wandb"]}
    for key, log in (("loss", "training_log.jsonl"), ("t2l/x0_cos_t0.9", "evaluation.jsonl")):
        kept = {values["step"]: values[key] for _, values in records if key in values}
        logged = {line["step"]: line[key.replace("_t0", "@0")] for line in json_lines(run / log)}
        assert kept == pytest.approx(logged)
    tables = {values["step"] for _, values in records if any(key.startswith("samples") for key in values)}
    assert tables == {4, 6}


@pytest.mark.parametrize(
    ("key", "module", "package"),
    [("logging.wandb", "wandb", "wandb"), ("logging.mlflow", "mlflow.tracking", "mlflow")],
)
def test_a_missing_package_is_refused_before_training(
    key: str, module: str, package: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"^{key}=true needs {package}; run `pip install {package}`$"):
        train(tracked(prepared, key), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    refuse_missing_packages(configured("data=synthetic"))


class Recorder:
    """A tracker that does what a test wants at the end."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act, self.told = act, list[float]()

    def numbers(self, values: Any) -> None:
        self.told.append(values["step"])
        self.act()

    def samples(self, step: int, samples: Any) -> None:
        self.told.append(step)

    def close(self, finished: bool) -> None:
        self.act()


def of_trackers(tmp_path: Path, **named: Any) -> Trackers:
    found = Trackers(configured("data=synthetic"), tmp_path, "demo", 1)
    found._open = dict(named)
    return found


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ConnectionError("no route\nto host")

    bad, good = Recorder(fail), Recorder(lambda: None)
    both = of_trackers(tmp_path, bad=bad, good=good)
    for step in (1, 2):
        both.numbers({"step": step})
    both.samples(3, SAMPLES)
    both.close(finished=True)
    assert (bad.told, good.told) == ([1], [1, 2, 3])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: bad: left out from here on (no route)")


def test_one_that_does_not_close_does_not_keep_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    end = threading.Event()
    started = time.monotonic()
    of_trackers(tmp_path, slow=Recorder(lambda: end.wait(20))).close(finished=True)
    assert time.monotonic() - started < 5
    assert "slow: did not take its last numbers" in capsys.readouterr().err
    end.set()


def test_tensorboard_has_samples_as_text(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = trackers.TensorBoard(tmp_path, 1)
    board.samples(7, SAMPLES)
    board.close(finished=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 7
    assert "    text   a <b>\n    l2t    None\n    t2l2t  a c" in event.tensor_proto.string_val[0].decode()
