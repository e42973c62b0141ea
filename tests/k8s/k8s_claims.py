"""The claims of runs and data, and what tests read of runs there."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_access import Access, GivenCluster, wait_for
from k8s_node import Node
from k8s_runs import ROOT, losses

SLOW = """import os, pathlib, time
opened = pathlib.Path.open
def slowly_opened(path, *arguments, **options):
    if path.name == "training_log.jsonl" and os.path.exists(__file__):
        time.sleep(1)
    return opened(path, *arguments, **options)
pathlib.Path.open = slowly_opened
"""
READER = "cyclevae-test-reader"
# Seconds from each disturbance to the first step that had not been done before: printed at the end of the session.
recovered: list[tuple[str, float]] = []


class Claims:
    """The claims `runs` and `data` of a namespace. Paths are below that of the runs."""

    def __init__(self, kubernetes: Access, namespace: str) -> None:
        self.kubernetes, self.namespace = kubernetes, namespace

    def read(self, path: str) -> str | None:
        """A file's text; None without it."""
        raise NotImplementedError

    def changed(self, path: str) -> str:
        """When a file was written, in words of the file system's; empty without it."""
        raise NotImplementedError

    def names(self, path: str) -> list[str]:
        """What a directory holds; nothing without it."""
        raise NotImplementedError

    def write(self, path: str, text: str) -> None:
        """Write a file, and make the directory in which it is."""
        raise NotImplementedError

    def move(self, path: str, to: str) -> None:
        raise NotImplementedError

    def remove(self, path: str) -> None:
        """Remove a directory with all that is in it."""
        raise NotImplementedError

    def losses(self, run: str) -> dict[int, dict[str, float]]:
        return losses(self.read(f"{run}/training_log.jsonl"))

    def last_step(self, run: str) -> int:
        """The last step that a run has logged; 0 before the first."""
        return max(self.losses(run), default=0)

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """Runs with PYTHONPATH=/runs/slow log a step a second: none ends before the test comes to disturb it."""
        self.write("slow/sitecustomize.py", SLOW)
        yield
        self.remove("slow")

    def reached(self, run: str, step: int, seconds: float = 200) -> None:
        """Wait until a run has logged a step."""
        wait_for(lambda: self.last_step(run) >= step, f"{run}: step {step}", seconds)

    @contextlib.contextmanager
    def disturbed(self, run: str, how: str) -> Iterator[None]:
        """Disturb a run, wait for its first new step, and note how long that took."""
        described = f"{run}/environment.json"  # rank 0 writes it at every start, when the ranks have met
        before, began = self.changed(described), time.monotonic()
        yield
        furthest = 0
        # A run that is told to stop logs a last step before it ends: that is no sign of its return.
        while self.changed(described) == before:
            furthest = max(furthest, self.last_step(run))
            assert time.monotonic() < began + 600, f"{run} has not begun again"
            time.sleep(0.2)
        self.reached(run, furthest + 1)
        recovered.append((how, time.monotonic() - began))

    def job(self, name: str, condition: str, seconds: float = 200) -> None:
        """Wait for a PyTorchJob's condition."""
        self.kubernetes.kubectl(
            "wait",
            f"--for=condition={condition}",
            f"pytorchjob/{name}",
            f"--namespace={self.namespace}",
            f"--timeout={seconds}s",
            seconds=seconds + 30,
        )


class ClaimsOfTheNode(Claims):
    """Claims of the tests' own cluster: directories of this machine, as a node has them."""

    def __init__(self, kubernetes: Node, namespace: str, directory: Path) -> None:
        super().__init__(kubernetes, namespace)
        self._runs = directory / "runs"
        kubernetes.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(volumes(namespace, directory)))

    def apply(self) -> None:
        path = str(ROOT / "k8s" / "base" / "claims.yaml")
        self.kubernetes.kubectl("apply", f"--namespace={self.namespace}", "--filename", path)

    def read(self, path: str) -> str | None:
        file = self._runs / path
        return file.read_text() if file.exists() else None

    def changed(self, path: str) -> str:
        file = self._runs / path
        return str(file.stat().st_mtime_ns) if file.exists() else ""

    def names(self, path: str) -> list[str]:
        directory = self._runs / path
        return sorted(one.name for one in directory.iterdir()) if directory.is_dir() else []

    def write(self, path: str, text: str) -> None:
        (self._runs / path).parent.mkdir(exist_ok=True)
        (self._runs / path).write_text(text)

    def move(self, path: str, to: str) -> None:
        (self._runs / path).rename(self._runs / to)

    def remove(self, path: str) -> None:
        shutil.rmtree(self._runs / path)


def volumes(namespace: str, directory: Path) -> list[dict[str, Any]]:
    """Volumes for the claims of a namespace, in new directories of this machine below `directory`."""
    objects: list[dict[str, Any]] = []
    for claim in yaml.safe_load_all((ROOT / "k8s" / "base" / "claims.yaml").read_text()):
        name, spec = claim["metadata"]["name"], claim["spec"]
        (directory / name).mkdir()
        # What fsGroup does on volumes of a cluster, but not on a directory of the node.
        (directory / name).chmod(0o777)
        volume = {
            "accessModes": spec["accessModes"],
            "capacity": spec["resources"]["requests"],
            "hostPath": {"path": str(directory / name)},
            "claimRef": {"namespace": namespace, "name": name},
        }
        objects.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{namespace}-{name}"},
                "spec": volume,
            }
        )
    return objects


class GivenClaims(Claims):
    """Claims of a cluster that is there, read through a pod that mounts them."""

    def __init__(self, kubernetes: GivenCluster) -> None:
        super().__init__(kubernetes, kubernetes.namespace)
        self._end_jobs = kubernetes.end_jobs
        spec = kubernetes.idle_pod()
        (container,) = spec["containers"]
        container["volumeMounts"] = [{"name": "runs", "mountPath": "/runs"}]
        spec["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": READER}, "spec": spec}
        self._where = f"--namespace={self.namespace}"
        kubernetes.kubectl("create", self._where, "--filename=-", stdin=json.dumps(pod))
        kubernetes.kubectl("wait", self._where, "--for=condition=Ready", f"pod/{READER}", "--timeout=300s", seconds=320)
        self._there = set(self.names("."))

    def remove_new(self) -> None:
        """Remove what tests have left on the claim, once nobody writes there any more."""
        self._end_jobs()
        for name in set(self.names(".")) - self._there:
            self.remove(name)

    def refuse_taken(self, *runs: str) -> None:
        """Fail where a run of this name is on the claim: the test would go on with it."""
        taken = self._there & set(runs)
        if taken:
            pytest.fail(
                f"the claim runs has {', '.join(sorted(taken))} already: give the tests a namespace of their own"
            )

    def _shell(self, script: str, *arguments: str, stdin: str | None = None) -> str:
        command = ("exec", self._where, "--stdin", READER, "--", "sh", "-c", f"cd /runs; {script}", "sh")
        return self.kubernetes.run("kubectl", *command, *arguments, stdin=stdin or "")

    def read(self, path: str) -> str | None:
        # With a mark at its end: the end of a line that is not there yet must not be lost.
        text = self._shell('if [ -e "$1" ]; then cat "$1"; echo .; fi', path)
        return text.removesuffix(".") if text else None

    def changed(self, path: str) -> str:
        return self._shell('stat --format=%y "$1" 2>/dev/null || true', path)

    def names(self, path: str) -> list[str]:
        return self._shell('ls "$1" 2>/dev/null || true', path).split()

    def write(self, path: str, text: str) -> None:
        self._shell('mkdir -p "$(dirname "$1")" && cat >"$1"', path, stdin=text)

    def move(self, path: str, to: str) -> None:
        self._shell('mv "$1" "$2"', path, to)

    def remove(self, path: str) -> None:
        self._shell('rm -r "$1"', path)
