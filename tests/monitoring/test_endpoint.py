"""The endpoint answers while the loop works, says whether it does, and is announced for as long as the job lives."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from job.config import Config, LoggingConfig, MonitoringConfig, TrainingConfig
from job.errors import UserError
from job.monitoring import targets, vitals
from job.monitoring.exporter import Metrics, Server
from job.monitoring.flops import Done, Work
from job.monitoring.goodput import Times
from job.monitoring.phases import Phases
from job.monitoring.reporter import Reporter, run_label
from job.monitoring.targets import RankAddress, Targets
from job.monitoring.vitals import Vitals
from job.runtime.checkpointer import SaveStats
from job.runtime.distributed import Process

VALUES = {
    "step": 5,
    "epoch": 0.5,
    "lr": 1e-3,
    "loss": 2.5,
    "base_l2t_text_loss": 2.0,
    "cycle_text_weight": 0.1,
    "tokens_per_second": 100.0,
    "step_seconds": 0.2,
    "data_wait_seconds": 0.01,
    "forward_seconds": 0.1,
    "model_flops_utilization": 0.3,
    "nonfinite_steps": 1,
}


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@dataclass
class Checks:
    healthy: bool = True
    ready: bool = False


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
def server(checks: Checks) -> Iterator[Server]:
    server = Server(
        None,
        None,
        Metrics("r", 0, lambda: {("cyclevae_step", ()): 7}).registry,
        lambda: (checks.healthy, "alive"),
        lambda: (checks.ready, "go"),
    )
    yield server
    server.close()


def test_answers_over_both_protocols(server: Server, checks: Checks) -> None:
    for host in ["127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])]:
        status, body = get(server.port, "/metrics", host)
        assert status == 200
        assert 'cyclevae_step{rank="0",run="r"} 7.0' in body
    assert get(server.port, "/healthz") == (200, "alive\n")
    assert get(server.port, "/readyz") == (503, "go\n")
    checks.healthy, checks.ready = False, True
    assert get(server.port, "/healthz")[0] == 503
    assert get(server.port, "/readyz")[0] == 200
    assert get(server.port, "/secrets")[0] == 404


def test_a_port_that_is_taken_does_not_end_the_run(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    second = Server("127.0.0.1", server.port, CollectorRegistry(), lambda: (True, ""), lambda: (True, ""))
    assert second.port not in (0, server.port)
    assert f"monitoring.port={server.port} cannot be used" in capsys.readouterr().err
    assert get(second.port, "/healthz")[0] == 200
    second.close()


@pytest.mark.parametrize("port", [None, 9400])
@pytest.mark.parametrize("host", ["192.0.2.1", "no host at all", ".", "x" * 300])
def test_a_host_that_is_none_of_this_machine_is_refused(
    host: str, port: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"monitoring\.host=.*is no address of this machine"):
        Server(host, port, CollectorRegistry(), lambda: (True, ""), lambda: (True, ""))
    assert capsys.readouterr().err == ""


def test_a_port_whose_last_connections_are_being_forgotten_is_taken_again(capsys: pytest.CaptureFixture[str]) -> None:
    """A restart finds its port as the run before left it: the server's side of a scrape waits a minute in TIME_WAIT."""

    def good() -> tuple[bool, str]:
        return True, ""

    before = Server("127.0.0.1", None, CollectorRegistry(), good, good)
    with socket.create_connection(("127.0.0.1", before.port)) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        while client.recv(4096):  # until the server has closed first
            pass
    before.close()
    after = Server("127.0.0.1", before.port, CollectorRegistry(), good, good)
    assert after.port == before.port
    assert capsys.readouterr().err == ""
    after.close()


def test_answers_are_not_compressed(server: Server) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Encoding"] is None
        assert b"cyclevae_step" in answer.read()


def test_everything_is_answered_whatever_the_query_asks_for(server: Server) -> None:
    assert "cyclevae_step" in get(server.port, "/metrics?name[]=cyclevae_epoch")[1]


def test_a_forked_process_does_not_hold_the_port(server: Server) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(0 if server._server.socket.fileno() == -1 else 1)
    os.close(reader)
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0


def test_the_loop_does_not_wait_for_a_scrape() -> None:
    """A scrape that hangs leaves every call of the loop free, and what it shows is of one moment."""
    scraping, go_on = threading.Event(), threading.Event()

    def live() -> dict[Any, float]:
        scraping.set()
        assert go_on.wait(30)
        return {}

    metrics = Metrics("r", 0, live)
    metrics.set({("cyclevae_step", ()): 1, ("cyclevae_epoch", ()): 1})
    server = Server("127.0.0.1", None, metrics.registry, lambda: (True, ""), lambda: (True, ""))
    answers: list[str] = []
    scrape = threading.Thread(target=lambda: answers.append(get(server.port, "/metrics")[1]))
    scrape.start()
    assert scraping.wait(10)
    for step in range(2, 100):  # would hang here
        metrics.set({("cyclevae_step", ()): step, ("cyclevae_epoch", ()): step})
        metrics.step_duration.observe(0.1)
    assert get(server.port, "/healthz")[0] == 200
    go_on.set()
    scrape.join(10)
    values = {line.split("{")[0]: line.split()[-1] for line in answers[0].splitlines() if line.startswith("cyclevae_")}
    assert values["cyclevae_step"] == values["cyclevae_epoch"]
    server.close()


def test_stalled_after_a_multiple_of_the_usual_step() -> None:
    silence = 100.0
    v = Vitals(lambda: silence, at_least=60.0, started=0.0)
    assert v.healthy() == (True, "starting")  # a compilation may take minutes
    v.step_ended()
    assert not v.healthy()[0]
    v.usual_step(10.0)
    assert v.stall_limit == 10.0 * vitals.USUAL_STEPS
    assert v.healthy()[0]
    silence = 201.0
    assert not v.healthy()[0]
    assert not v.ready()[0]
    v.training = True
    assert v.ready()[0]


def test_targets_name_every_rank_and_go_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, age in (
        ("cyclevae-sweep_lr_1@17.json", 0.0),
        ("cyclevae-other@3.json", 0.0),
        ("cyclevae-dead@4.json", targets.STALE_SECONDS + 60),
        ("mine.json", 1e6),
    ):
        (tmp_path / name).write_text("[]")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    ranks = [RankAddress("10.0.0.1", 9400, "n1"), RankAddress("fe80::1", 9401, "n2")]
    announced = Targets(tmp_path, "sweep/lr=1", "18", ranks)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cyclevae-other@3.json",
        "cyclevae-sweep_lr_1@18.json",
        "mine.json",
    ]
    assert json.loads(announced.path.read_text()) == [
        {"targets": ["10.0.0.1:9400"], "labels": {"run": "sweep/lr=1", "job_id": "18", "rank": "0", "node": "n1"}},
        {"targets": ["[fe80::1]:9401"], "labels": {"run": "sweep/lr=1", "job_id": "18", "rank": "1", "node": "n2"}},
    ]
    announced.path.unlink()  # by a job that took it for a leftover, while this one was frozen
    announced.refresh()
    assert not announced.path.exists()
    monkeypatch.setattr(targets, "REFRESH_SECONDS", 0.0)
    announced.refresh()
    assert announced.path.exists()
    announced.remove()
    assert not announced.path.exists()


def test_the_label_of_a_run_tells_points_of_a_sweep_apart(tmp_path: Path) -> None:
    assert run_label(tmp_path / "runs" / "sweep" / "lr=1", tmp_path / "runs") == "sweep/lr=1"
    assert run_label(tmp_path / "elsewhere" / "demo", tmp_path / "runs") == "demo"


@dataclass
class Run:
    """A reporter's surroundings."""

    directory: Path
    config: Config = field(init=False)
    saves: SaveStats = field(default_factory=SaveStats)
    phases: Phases = field(default_factory=Phases)
    work: Work = field(default_factory=lambda: Work(Config().model, 100, 8))

    def __post_init__(self) -> None:
        self.config = Config(
            logging=LoggingConfig(save_dir=str(self.directory)),
            training=TrainingConfig(num_train_steps=10),
            monitoring=MonitoringConfig(host="127.0.0.1"),
        )

    def reporter(self) -> Reporter:
        return Reporter(
            self.config,
            self.directory / "demo",
            Process(0, 0, 1, torch.device("cpu"), "here"),
            self.phases,
            self.work,
            dtype=torch.float32,
            saves=self.saves,
            silence=lambda: 1.0,
            gather=lambda value: [value],
            times=Times(time.time() - 5),
        )

    def scrape(self) -> dict[str, float]:
        """What the announced endpoint says, by series without run and rank."""
        target = json.loads((self.directory / ".targets" / "cyclevae-demo@local.json").read_text())[0]["targets"][0]
        lines = get(int(target.rpartition(":")[2]), "/metrics")[1].splitlines()
        pairs = [
            line.replace('rank="0",run="demo"', "").replace("{}", "").replace(",}", "}").rsplit(" ", 1)
            for line in lines
            if not line.startswith("#")
        ]
        return {name.replace("{,", "{"): float(value) for name, value in pairs}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "demo").mkdir()
    return Run(tmp_path)


def test_logs_and_metrics_show_the_same_numbers(run: Run) -> None:
    run.config.monitoring.tensorboard = True
    pytest.importorskip("tensorboard")
    with run.reporter() as reporter:
        reporter.begin(0, -1)
        with reporter.phases("step"):
            time.sleep(0.01)
        for _ in range(5):
            reporter.step_ended()
        reporter.interval(
            VALUES, {"step": 0.5, "data_wait": 0.1, "checkpoint": 0.0, "evaluate": 0.0}, Done(50, 10, 1e6)
        )
        reporter.evaluation(5, {"l2t/latent_gain": 0.4, "t2l/x0_cos@0.9": 0.8})
        run.saves.saves, run.saves.bytes = 1, 77
        values = run.scrape()
    assert json.loads((run.directory / "demo" / "training_log.jsonl").read_text()) == VALUES
    assert values['cyclevae_loss{term="base_l2t_text"}'] == VALUES["base_l2t_text_loss"]
    assert values['cyclevae_loss_weight{term="cycle_text"}'] == VALUES["cycle_text_weight"]
    assert values["cyclevae_model_flops_utilization_ratio"] == 0.3
    assert values["cyclevae_nonfinite_steps_total"] == 1
    assert values["cyclevae_progress_ratio"] == 0.5
    assert values["cyclevae_tokens_total"] == 50
    assert values['cyclevae_goodput_seconds_total{phase="productive"}'] == 0.5
    assert values['cyclevae_goodput_seconds_total{phase="starting"}'] >= 5
    assert values["cyclevae_eval_l2t_latent_gain"] == 0.4
    assert values['cyclevae_eval_t2l_x0_cos{t="0.9"}'] == 0.8
    assert values["cyclevae_step_duration_seconds_count"] == 5
    assert (values["cyclevae_checkpoint_saves_total"], values["cyclevae_checkpoint_share_bytes"]) == (1, 77)
    assert not list((run.directory / ".targets").iterdir())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory / "demo" / "tensorboard"))
    events.Reload()
    assert events.Scalars("base_l2t_text_loss")[0].value == pytest.approx(2.0)
    assert events.Scalars("l2t/latent_gain")[0].step == 5


def test_counters_go_on_after_a_restart(run: Run) -> None:
    """The first start logs step 5 and ends after step 6, the second goes on from step 3."""
    seconds = {"step": 0.5, "data_wait": 0.1, "checkpoint": 0.0, "evaluate": 0.0}
    for start in (0, 3):
        with run.reporter() as reporter:
            reporter.begin(start, -1)
            for _ in range(5):
                reporter.step_ended()
            reporter.interval({**VALUES, "step": start + 5}, seconds, Done(50, 10, 1e6))
            values = run.scrape()
            run.work.add(np.array([4, 6]), {"l2t": 1})
            reporter.step_ended()
    assert (
        values["cyclevae_restarts_total"],
        values["cyclevae_steps_total"],
        values["cyclevae_replayed_steps_total"],
    ) == (1, 11, 3)
    assert values["cyclevae_tokens_total"] == 110
    assert values['cyclevae_goodput_seconds_total{phase="replayed"}'] == pytest.approx(0.3)
    assert [
        json.loads(line)["step"] for line in (run.directory / "demo" / "training_log.jsonl").read_text().splitlines()
    ] == [8]


def test_replayed_steps_count_from_the_last_log_line(run: Run) -> None:
    """A killed run leaves a log that is ahead of goodput.json."""
    (run.directory / "demo" / "training_log.jsonl").write_text('{"step": 5}\n{"step": 10}\n')
    with run.reporter() as reporter:
        reporter.begin(5, -1)
        for _ in range(6):
            reporter.step_ended()
    assert json.loads((run.directory / "demo" / "goodput.json").read_text())["replayed_steps"] == 5


def test_without_an_endpoint_the_logs_go_on(run: Run) -> None:
    run.config.monitoring = MonitoringConfig(enabled=False)
    with run.reporter() as reporter:
        reporter.begin(0, -1)
        reporter.interval(
            VALUES, {"step": 0.5, "data_wait": 0.1, "checkpoint": 0.0, "evaluate": 0.0}, Done(50, 10, 1e6)
        )
    assert not (run.directory / ".targets").exists()
    assert (run.directory / "demo" / "training_log.jsonl").exists()


def test_tensorboard_that_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.config.monitoring.tensorboard = True
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"), run.reporter() as reporter:
        reporter.begin(0, -1)
    assert not list((run.directory / ".targets").iterdir())
