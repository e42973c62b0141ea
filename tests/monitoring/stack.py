"""A real Prometheus and a real Alertmanager on loopback, with the project's own configuration.

By hand: `python tests/monitoring/stack.py RUNS` watches the runs below RUNS until Ctrl-C, with rules as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docker" / "monitoring"))  # for whoever starts this by hand: pytest knows the place

from rules import rule_file  # noqa: E402

ALERTMANAGER, PUSHGATEWAY = ("prometheus-alertmanager", "prometheus-pushgateway")  # Debian's names
MISSING = [
    name for name in ("prometheus", "promtool", "amtool", ALERTMANAGER, PUSHGATEWAY) if shutil.which(name) is None
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def get(url: str, **parameters: str) -> Any:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
        return json.load(answer)


def until(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    """The first true value of a condition, asked for four times a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.25)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Receiver:
    """Where Alertmanager sends its notifications."""

    def __init__(self) -> None:
        self.status: dict[frozenset[tuple[str, str]], str] = {}  # what was last told of every alert, by its labels
        status = self.status

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                for alert in json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]:
                    status[frozenset(alert["labels"].items())] = alert["status"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Stack:
    """Both programs, watching the runs below `runs`; rules' times are `speed` times shorter."""

    def __init__(self, directory: Path, runs: Path, speed: float, scrape: str = "1s") -> None:
        self.receiver, self.targets = Receiver(), runs / ".targets"
        self.targets.mkdir(parents=True, exist_ok=True)
        prometheus, alertmanager = free_port(), free_port()
        self.url, self.alertmanager = f"http://127.0.0.1:{prometheus}", f"http://127.0.0.1:{alertmanager}"
        (directory / "rules.yml").write_text(yaml.safe_dump(rule_file(speed)))
        config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": scrape, "scrape_timeout": scrape, "evaluation_interval": scrape}
        config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager}"]
        discovery = config["scrape_configs"][0]["file_sd_configs"][0]
        discovery.update(files=[str(self.targets / "*.json")], refresh_interval="1s")
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        routes = yaml.safe_load((ROOT / "docker/alertmanager/alertmanager.yml").read_text())
        routes["route"].update(group_wait="200ms", group_interval="1s")
        routes["receivers"][0]["webhook_configs"] = [{"url": f"http://127.0.0.1:{self.receiver.server.server_port}"}]
        (directory / "alertmanager.yml").write_text(yaml.safe_dump(routes))
        commands = (
            [
                ALERTMANAGER,
                f"--config.file={directory}/alertmanager.yml",
                f"--storage.path={directory}/alertmanager",
                f"--web.listen-address=127.0.0.1:{alertmanager}",
                "--cluster.listen-address=",
            ],
            [
                "prometheus",
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{prometheus}",
            ],
        )
        self.processes = []
        for number, command in enumerate(commands):
            with (directory / f"{number}.log").open("w") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        until(self._ready, f"Prometheus and Alertmanager answer (see the logs in {directory})")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Result of an instant query. A query that Prometheus refuses raises HTTPError."""
        result: list[dict[str, Any]] = get(f"{self.url}/api/v1/query", query=expression)["data"]["result"]
        return result

    def value(self, expression: str) -> float | None:
        result = self.query(expression)
        return float(result[0]["value"][1]) if result else None

    def range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = get(
            f"{self.url}/api/v1/query_range", query=expression, start=f"{start}", end=f"{end}", step=f"{step}"
        )["data"]["result"]
        return result

    def active(self, name: str, **labels: str) -> list[dict[str, Any]]:
        """Alerts that Alertmanager has now."""
        return [
            alert
            for alert in get(f"{self.alertmanager}/api/v2/alerts")
            if alert["labels"]["alertname"] == name and labels.items() <= alert["labels"].items()
        ]

    def notified(self, status: str, name: str, **labels: str) -> bool:
        """Whether the last that the receiver was told of an alert is that it is `firing` or `resolved`."""
        wanted = {"alertname": name, **labels}.items()
        return any(wanted <= alert and last == status for alert, last in list(self.receiver.status.items()))

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)
        self.receiver.server.shutdown()

    def _ready(self) -> bool:
        try:
            return all(
                urllib.request.urlopen(f"{url}/-/ready", timeout=5).status == 200
                for url in (self.url, self.alertmanager)
            )
        except OSError:
            return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--speed", type=float, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(Path(directory), options.runs.resolve(), options.speed)
        print(f"Prometheus {stack.url}  Alertmanager {stack.alertmanager}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            stack.close()


if __name__ == "__main__":
    main()
