"""The endpoint of one rank: /metrics for Prometheus, /healthz and /readyz for whoever restarts it.

The loop never waits for a scrape. It hands over whole snapshots, a dict of numbers each time, by setting one
attribute: so a scrape, which runs in a thread of its own, sees either the old snapshot or the new one, and no lock is
needed. What a scrape shows of the loop is therefore of one moment, and a scrape that hangs holds nobody up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Histogram, MetricsHandler, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as PrometheusMetric
from prometheus_client.registry import Collector

from job.errors import UserError
from job.metric_names import METRICS, OF_EACH_RANK, STEP_BUCKETS, Series

Snapshot = Mapping[Series, float]
Check = Callable[[], tuple[bool, str]]  # whether, and a word on why
REQUEST_SECONDS = 5.0
FROM_EVERY_RANK = frozenset(metric.name for metric in OF_EACH_RANK)
STEP_DURATION = METRICS["cyclevae_step_duration_seconds"]

# Or the histogram would add a series `..._created`, which says no more than cyclevae_start_timestamp_seconds.
disable_created_metrics()


class Metrics(Collector):
    """What this rank exports: the snapshots that were set, and what `live` says at the moment of a scrape.

    Step times go into a histogram here, on the host, at every step: Prometheus scrapes every few seconds and would
    see a mean or one step of many, and a mean hides the one slow step in a hundred that all other ranks wait for.
    """

    def __init__(self, run: str, rank: int, live: Callable[[], Snapshot]) -> None:
        self.run, self.rank, self.live = run, rank, live
        self._from_loop: Snapshot = {}
        self._observed: Snapshot = {}  # by the monitoring thread
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self._durations = Histogram(
            STEP_DURATION.name, STEP_DURATION.help, ("run", "rank"), buckets=STEP_BUCKETS, registry=None
        )
        self.step_duration = self._durations.labels(run, str(rank))

    def set(self, values: Snapshot) -> None:
        """Take values over into the next scrapes; from the loop's thread.

        A rank above 0 keeps its own and drops the run's.
        """
        shown = {series: value for series, value in values.items() if self.rank == 0 or series[0] in FROM_EVERY_RANK}
        self._from_loop = {**self._from_loop, **shown}

    def observe(self, values: Snapshot) -> None:
        """Replace what the monitoring thread saw."""
        self._observed = values

    def describe(self) -> Iterable[PrometheusMetric]:
        """Nothing: what is exported is known only once it was set."""
        return []

    def collect(self) -> Iterable[PrometheusMetric]:
        """The values of a scrape, as prometheus_client writes them."""
        values, common = {**self._from_loop, **self._observed, **self.live()}, (self.run, str(self.rank))
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for (name, labels), value in values.items():
            metric = METRICS[name]
            if name not in families:
                family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[name] = family(name, metric.help, labels=("run", "rank", *metric.labels))
            families[name].add_metric((*common, *labels), value)
        yield from families.values()
        for histogram in self._durations.collect():
            # Whole bounds are le="1" in our series, but le="1.0" as prometheus_client writes them. Another label makes
            # another series: a run that goes on under another version of this package would have two histograms.
            for sample in histogram.samples:
                if "le" in sample.labels:
                    sample.labels["le"] = sample.labels["le"].removesuffix(".0")
            yield histogram


class Server:
    """HTTP on a thread of its own: metrics of a registry, and two checks that answer 200 or 503 with a word on why."""

    def __init__(
        self, host: str | None, port: int | None, registry: CollectorRegistry, healthy: Check, ready: Check
    ) -> None:
        self._server = listen(host, port, _handler(registry, {"/healthz": healthy, "/readyz": ready}))
        self.port: int = self._server.server_address[1]
        # Loader workers are forked from this process and get its open sockets. One that outlives the rank, for
        # instance because it waits for a file system, would keep the port taken, so that the restarted rank could not
        # listen there.
        os.register_at_fork(after_in_child=self._server.socket.close)
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(registry: CollectorRegistry, checks: Mapping[str, Check]) -> type[BaseHTTPRequestHandler]:
    """Answers /metrics as prometheus_client's own handler does, and the paths of `checks`."""

    class Handler(MetricsHandler):
        timeout = REQUEST_SECONDS  # a client that sends nothing does not keep a thread

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            with contextlib.suppress(ConnectionError):  # whoever asked has gone
                if path == "/metrics":
                    # Prometheus says that it takes gzip. That adds a quarter to the processor time of a scrape, on the
                    # machine that feeds the GPU, to save a few kilobytes of network: the handler does not get to know.
                    del self.headers["Accept-Encoding"]
                    self.path = path  # always everything: a choice by ?name[]=... would find nothing of `Metrics`
                    super().do_GET()
                elif path in checks:
                    good, why = checks[path]()
                    self._answer(200 if good else 503, why)
                else:
                    self._answer(404, f"/metrics {' '.join(checks)}")

        def _answer(self, status: int, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    handler: type[BaseHTTPRequestHandler] = Handler.factory(registry)
    return handler


def listen(host: str | None, port: int | None, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """A server on `host` (None: every address, IPv4 and IPv6) and `port`; on a free port when it is None or taken.

    Raises UserError when `host` is not an address of this machine.
    """
    dual = host is None and socket.has_dualstack_ipv6()
    wildcard = "::" if dual else ""
    family = socket.AF_INET6 if dual or (host and ":" in host) else socket.AF_INET

    class Listening(ThreadingHTTPServer):
        address_family = family
        daemon_threads = True

        def server_bind(self) -> None:
            """Bind, unlike the standard library without looking the host's name up, which hangs while DNS is away."""
            # When a run ends, its side of a connection to Prometheus waits for a minute (TIME_WAIT) and keeps the
            # port taken for others. With this option a restart may have it all the same; a port that somebody listens
            # on stays refused.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if dual:  # whatever the system's default is, also take IPv4
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self.socket.bind(self.server_address)
            self.server_address = self.socket.getsockname()

    try:
        try:
            return Listening((host or wildcard, port or 0), handler)
        except OSError as error:
            if not port or is_about_host(error):
                raise
            print(
                f"warning: monitoring.port={port} cannot be used ({error.strerror}); "
                "metrics are on a free port instead",
                file=sys.stderr,
            )
            return Listening((host or wildcard, 0), handler)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host is written like that
        if host is None or not is_about_host(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"monitoring.host={host} is no address of this machine ({reason}); "
            "leave it out to listen on all, or set monitoring.enabled=false"
        ) from error


def is_about_host(error: OSError | UnicodeError) -> bool:
    """Whether a server could not listen because of its address, and not of its port."""
    of_the_address = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
    no_such_host = isinstance(error, UnicodeError | socket.gaierror)
    return no_such_host or (isinstance(error, OSError) and error.errno in of_the_address)
