"""Tells Kubeflow Trainer how far a run is, so that it stands in its TrainJob (`kubectl get trainjob NAME -o yaml`).

Trainer's controller takes it over HTTPS (its feature gate TrainJobStatus). It is told from a thread: the loop hands
over its last values and waits for nobody, whether the controller answers, hangs or is gone.
"""

from __future__ import annotations

import json
import math
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 5.0  # between two posts, at least
ANSWER_SECONDS = 10.0
CLOSE_SECONDS = 3.0  # for the last post, at the end of a run
LONGEST = 64  # characters of a name or a value
MOST = 256  # metrics


@dataclass(frozen=True)
class TrainerServer:
    """Where and how Trainer's controller is told: what it puts into the environment of pods."""

    url: str
    token: Path  # of the pod; Kubernetes renews the file within the hour
    certificate: Path | None  # of the authority that signed the server's

    def post(self, status: Mapping[str, Any]) -> None:
        """Send a status. OSError when it was not taken."""
        headers = {"Authorization": f"Bearer {self.token.read_text().strip()}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url, json.dumps({"trainerStatus": status}).encode(), headers)
        trusted = ssl.create_default_context(cafile=str(self.certificate)) if self.certificate else None
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS, context=trusted) as answer:
            answer.read()


def status_of(step: int, total: int, seconds_left: float, values: Mapping[str, float]) -> dict[str, Any]:
    """A run's progress and the losses among its `values`, as Trainer's API has them."""
    shown = {"step": step, "steps": total, **{name: value for name, value in values.items() if _is_told(name, value)}}
    return {
        "progressPercentage": int(100 * step / total),
        "estimatedRemainingSeconds": round(seconds_left),
        "metrics": [{"name": name, "value": f"{value:.6g}"} for name, value in list(shown.items())[:MOST]],
        "lastUpdatedTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _is_told(name: str, value: float) -> bool:
    told = "loss" in name or name == "tokens_per_second"
    return told and len(name) <= LONGEST and math.isfinite(value)


class TrainerStatus:
    """Posts the newest status from a thread of its own; what comes while a post is under way replaces what waits."""

    def __init__(self, server: TrainerServer) -> None:
        self._server = server
        self._newest: dict[str, Any] | None = None
        self._wake, self._end = threading.Event(), threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="trainer status", daemon=True)
        self._thread.start()

    def tell(self, step: int, total: int, seconds_left: float, values: Mapping[str, float]) -> None:
        """Post this as soon as it may be; returns at once."""
        self._newest = status_of(step, total, seconds_left, values)
        self._wake.set()

    def close(self) -> None:
        """Post what is still waiting, but wait for it no longer than a moment."""
        self._end.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            status, self._newest = self._newest, None
            if status is not None:
                self._post(status)
            if self._end.is_set() and self._newest is None:
                return
            self._end.wait(INTERVAL_SECONDS)

    def _post(self, status: Mapping[str, Any]) -> None:
        try:
            self._server.post(status)
        except (OSError, ValueError) as error:  # ValueError: an address or an answer that is none
            if not self._warned:  # once: a controller that stays away would fill the output
                print(
                    f"warning: progress could not be told to {self._server.url}: {error}", file=sys.stderr, flush=True
                )
            self._warned = True
