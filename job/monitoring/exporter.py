"""The endpoint of one rank: /metrics for Prometheus, /healthz and /readyz for whoever restarts it.

The loop never waits for a scrape: it swaps whole snapshots in, and a scrape reads the one it finds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from job.monitoring.metrics import METRICS, RANK_NAMES, STEP_BUCKETS, Series

Snapshot = Mapping[Series, float]
REQUEST_SECONDS = 5.0


class Histogram:
    """Step times in STEP_BUCKETS, written by the loop alone."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(STEP_BUCKETS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(STEP_BUCKETS, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        bounds = [*(f"{bound:g}" for bound in STEP_BUCKETS), "+Inf"]
        return list(zip(bounds, map(float, itertools.accumulate(self.counts)), strict=True))


class Metrics(Collector):
    """What this rank exports: the snapshots that were set, and what `live` says at the moment of a scrape."""

    def __init__(self, run: str, rank: int, live: Callable[[], Snapshot]) -> None:
        self.run, self.rank, self.live = run, rank, live
        self.step_duration = Histogram()
        self._values: Snapshot = {}  # the loop's
        self._observed: Snapshot = {}  # the monitoring thread's
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def set(self, values: Snapshot) -> None:
        """Take values over into the next scrapes; from the loop's thread. A rank above 0 keeps its own and drops the run's."""
        self._values = {
            **self._values,
            **{series: value for series, value in values.items() if self.rank == 0 or series[0] in RANK_NAMES},
        }

    def observe(self, values: Snapshot) -> None:
        """Replace what the monitoring thread saw."""
        self._observed = values

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        values, common = {**self._values, **self._observed, **self.live()}, (self.run, str(self.rank))
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for (name, labels), value in values.items():
            metric = METRICS[name]
            if name not in families:
                family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[name] = family(name, metric.help, labels=("run", "rank", *metric.labels))
            families[name].add_metric((*common, *labels), value)
        yield from families.values()
        metric = METRICS["cyclevae_step_duration_seconds"]
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=("run", "rank"))
        histogram.add_metric(common, self.step_duration.buckets(), self.step_duration.total)
        yield histogram


class Server:
    """HTTP on a thread of its own. `healthy` and `ready` give whether, and a word on why."""

    def __init__(
        self,
        host: str | None,
        port: int | None,
        registry: CollectorRegistry,
        healthy: Callable[[], tuple[bool, str]],
        ready: Callable[[], tuple[bool, str]],
    ) -> None:
        checks = {"/healthz": healthy, "/readyz": ready}

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS  # a client that sends nothing does not keep a thread

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                    self.answer(200, content_type, encode(registry))
                elif path in checks:
                    good, why = checks[path]()
                    self.answer(200 if good else 503, "text/plain; charset=utf-8", f"{why}\n".encode())
                else:
                    self.answer(404, "text/plain; charset=utf-8", b"/metrics /healthz /readyz\n")

            def answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not logged."""

        self._server = listen(host, port, Handler)
        self.port: int = self._server.server_address[1]
        os.register_at_fork(
            after_in_child=self._server.socket.close
        )  # a loader worker that outlives the rank must not hold its port
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def listen(host: str | None, port: int | None, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """A server on `host` (None: every address, IPv4 and IPv6) and `port`; on a free port when none is given or it is taken."""
    dual = host is None and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or (host and ":" in host) else socket.AF_INET

    class Listening(ThreadingHTTPServer):
        address_family = family
        daemon_threads = True

        def server_bind(self) -> None:
            if dual:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self.socket.bind(self.server_address)
            self.server_address = self.socket.getsockname()

    wildcard = "::" if dual else ""
    try:
        return Listening((host or wildcard, port or 0), handler)
    except OSError as error:
        if not port:
            raise
        print(
            f"warning: monitoring.port={port} cannot be used ({error.strerror}); metrics are on a free port instead",
            file=sys.stderr,
        )
        return Listening((host or wildcard, 0), handler)
