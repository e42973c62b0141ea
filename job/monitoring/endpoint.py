"""How Prometheus comes to a rank's metrics: the HTTP server, the file that announces it, and the Pushgateway where one is named."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import delete_from_gateway, push_to_gateway

from job.config import Config, targets_dir
from job.monitoring.exporter import Metrics, Server
from job.monitoring.targets import Targets
from job.monitoring.vitals import Vitals

HOUSEKEEPING_SECONDS = 5.0
JOB = "cyclevae"  # the label `job` of everything we export


class Endpoint:
    """Server and thread of one rank. `observe` is called by the thread every few seconds; `gather` by the caller's, on every rank."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        vitals: Vitals,
        local_rank: int,
        job_id: str,
        gather: Callable[[Any], list[Any]],
        observe: Callable[[], None],
    ) -> None:
        c = config.monitoring
        self._metrics, self._observe = metrics, observe
        self._targets: Targets | None = None
        self._gateway = c.pushgateway if c.enabled else None
        self._server = (
            Server(c.host, c.port + local_rank if c.port else None, metrics.registry, vitals.healthy, vitals.ready)
            if c.enabled
            else None
        )
        if self._server is not None:
            node = socket.gethostname()
            everyone = gather((node if c.host in (None, "0.0.0.0", "::") else c.host, self._server.port, node))
            if metrics.rank == 0:
                self._announce(targets_dir(config), job_id, everyone)
        self._warned = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitoring", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take everything back: the metrics end here."""
        self._end.set()
        self._thread.join(HOUSEKEEPING_SECONDS)
        try:
            if self._targets is not None:
                self._targets.remove()
            if self._gateway is not None:
                delete_from_gateway(self._gateway, JOB, self._grouping, timeout=HOUSEKEEPING_SECONDS)
        except OSError as error:
            self._warn(error)
        if self._server is not None:
            self._server.close()

    @property
    def _grouping(self) -> dict[str, str]:
        return {"run": self._metrics.run, "rank": str(self._metrics.rank)}

    def _announce(self, directory: Path, job_id: str, everyone: list[tuple[str, int, str]]) -> None:
        try:
            self._targets = Targets(directory, self._metrics.run, job_id, everyone)
        except OSError as error:
            print(
                f"warning: {directory} cannot be written ({error}), so Prometheus will not find this run there; set monitoring.targets_dir",
                file=sys.stderr,
            )

    def _run(self) -> None:
        while True:
            try:
                self._observe()
                if self._targets is not None:
                    self._targets.refresh()
                if self._gateway is not None:
                    push_to_gateway(
                        self._gateway, JOB, self._metrics.registry, self._grouping, timeout=HOUSEKEEPING_SECONDS
                    )
            except OSError as error:  # a disk or a gateway away for a while
                self._warn(error)
            if self._end.wait(HOUSEKEEPING_SECONDS):
                return

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            print(f"warning: monitoring: {error}", file=sys.stderr, flush=True)
        self._warned = True
