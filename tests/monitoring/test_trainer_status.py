"""What Kubeflow Trainer is told of a run: a server that answers as its controller does, one that hangs, and none."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from job.monitoring import trainer_status
from job.monitoring.progress import Progress
from job.monitoring.trainer_status import TrainerServer, TrainerStatus
from job.runtime.launcher_variables import trainer_server

VALUES = {"loss": 6.5, "base_l2t_text_loss": 4.25, "cycle_text_loss": float("nan"), "lr": 0.1, "tokens_per_second": 9.0}


class Controller:
    """Trainer's controller: takes a status from whoever has the token."""

    def __init__(self, directory: Path) -> None:
        self.token = directory / "token"
        self.taken: list[dict[str, Any]] = []
        self.refused = 0
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.asked.set()
                owner.go_on.wait(30)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                known = self.headers["Authorization"] == f"Bearer {owner.token.read_text().strip()}"
                owner.refused += not known
                if known:
                    owner.taken.append(body["trainerStatus"])
                self.send_response(200 if known else 401)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = TrainerServer(f"http://127.0.0.1:{self.server.server_port}/status", self.token, None)

    def has_taken(self, number: int) -> None:
        end = time.monotonic() + 10
        while len(self.taken) < number:
            assert time.monotonic() < end, self.taken
            time.sleep(0.01)


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    monkeypatch.setattr(trainer_status, "INTERVAL_SECONDS", 0.01)
    one = Controller(tmp_path)
    one.token.write_text("first\n")
    yield one
    one.go_on.set()
    one.server.shutdown()


def test_progress_and_losses_are_told(controller: Controller) -> None:
    progress = Progress(100, 0, show=True, trainer=controller.address)
    progress.log(42, VALUES)
    controller.has_taken(1)
    (status,) = controller.taken
    assert status["progressPercentage"] == 42
    assert isinstance(status["estimatedRemainingSeconds"], int)
    metrics = {one["name"]: one["value"] for one in status["metrics"]}
    told = {"step": "42", "steps": "100", "loss": "6.5", "base_l2t_text_loss": "4.25", "tokens_per_second": "9"}
    assert metrics == told, "what is not finite is no number for Trainer"
    assert time.strptime(status["lastUpdatedTime"], "%Y-%m-%dT%H:%M:%SZ")
    progress.log(100, VALUES)
    progress.close()
    assert controller.taken[-1]["progressPercentage"] == 100, "the last is posted before the end"


def test_a_token_that_was_renewed_is_read_again(controller: Controller) -> None:
    status = TrainerStatus(controller.address)
    for number, token in enumerate(("first", "second"), start=1):
        controller.token.write_text(token)
        status.tell(number, 10, 1.0, VALUES)
        controller.has_taken(number)
    assert controller.refused == 0


def test_the_loop_waits_for_no_controller(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_status, "CLOSE_SECONDS", 0.2)
    controller.go_on.clear()
    status = TrainerStatus(controller.address)
    began = time.monotonic()
    status.tell(1, 1000, 1.0, VALUES)
    assert controller.asked.wait(10)
    for step in range(2, 1000):
        status.tell(step, 1000, 1.0, VALUES)
    status.close()
    assert time.monotonic() - began < 20, "a controller that does not answer for 30 s is not waited for"
    controller.go_on.set()
    controller.has_taken(2)
    assert len(controller.taken) <= 3, "what came meanwhile was replaced by the newest"
    assert controller.taken[-1]["metrics"][0] == {"name": "step", "value": "999"}


def test_no_controller_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("t")
    status = TrainerStatus(TrainerServer("http://127.0.0.1:9/", tmp_path / "token", None))
    for step in (1, 2):
        status.tell(step, 10, 1.0, VALUES)
    status.close()
    assert capsys.readouterr().err.count("progress could not be told to http://127.0.0.1:9/") == 1


def test_where_the_pod_has_it_from() -> None:
    variables = {"KUBEFLOW_TRAINER_SERVER_URL": "https://t/x", "KUBEFLOW_TRAINER_SERVER_TOKEN": "/v/token"}
    assert trainer_server({}) is None
    assert trainer_server(variables) == ("https://t/x", Path("/v/token"), None)
    variables["KUBEFLOW_TRAINER_SERVER_CA_CERT"] = "/v/ca.crt"
    assert trainer_server(variables) == ("https://t/x", Path("/v/token"), Path("/v/ca.crt"))
