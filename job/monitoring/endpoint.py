"""How Prometheus comes to a rank's metrics: an HTTP server, the file that announces it, a Pushgateway if asked for."""

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
from job.monitoring.targets import RankAddress, Targets
from job.monitoring.vitals import Vitals

HOUSEKEEPING_SECONDS = 5.0
JOB = "cyclevae"  # the label `job` of everything we export
WILDCARDS = ("0.0.0.0", "::")


class Endpoint:
    """Server and housekeeping thread of one rank.

    The thread calls `observe` every few seconds: what it reads (the device, the checkpoints on disk) may take a while
    on a file system that is busy, and the loop must not wait for it. `gather` is called here, once, by every rank.
    """

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
        self._gateway = c.pushgateway if c.enabled else None
        self._server: Server | None = None
        self._targets: Targets | None = None
        if c.enabled:
            port = c.port + local_rank if c.port else None
            self._server = Server(c.host, port, metrics.registry, vitals.healthy, vitals.ready)
            node = socket.gethostname()
            host = node if c.host is None or c.host in WILDCARDS else c.host
            ranks = gather(RankAddress(host, self._server.port, node))
            if metrics.rank == 0:
                self._announce(targets_dir(config), job_id, ranks)
        self._warned = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_house, name="monitoring", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take everything back: the metrics end here."""
        self._end.set()
        self._thread.join(HOUSEKEEPING_SECONDS)
        try:
            if self._targets is not None:
                self._targets.remove()
            if self._gateway is not None:
                # The Pushgateway would otherwise show the last values for ever, and alerts would take them for a run
                # that stands still.
                delete_from_gateway(self._gateway, JOB, self._grouping, timeout=HOUSEKEEPING_SECONDS)
        except OSError as error:
            self._warn(error)
        if self._server is not None:
            self._server.close()

    @property
    def _grouping(self) -> dict[str, str]:
        return {"run": self._metrics.run, "rank": str(self._metrics.rank)}

    def _announce(self, directory: Path, job_id: str, ranks: list[RankAddress]) -> None:
        try:
            self._targets = Targets(directory, self._metrics.run, job_id, ranks)
        except OSError as error:
            print(
                f"warning: {directory} cannot be written ({error}), so Prometheus will not find this run there; "
                "set monitoring.targets_dir",
                file=sys.stderr,
            )

    def _keep_house(self) -> None:
        """The thread: until the end, observe, renew what announces this job, push where asked to."""
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
        """Once: a gateway that stays away would fill the output."""
        if not self._warned:
            print(f"warning: monitoring: {error}", file=sys.stderr, flush=True)
        self._warned = True
