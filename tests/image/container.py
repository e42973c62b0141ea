"""Containers of the tests: as locked up as a cluster may have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import build
import pytest

MISSING = [program for program in build.PROGRAMS if shutil.which(program) is None]
MARKS = [  # of every file that builds the image
    pytest.mark.skipif(
        "CYCLEVAE_TEST_IMAGE" not in os.environ, reason="builds an image, minutes: `make image-tools test-image`"
    ),
    pytest.mark.skipif(
        bool(MISSING) or os.geteuid() != 0, reason=f"needs root and {', '.join(MISSING)}: `make image-tools`"
    ),
    pytest.mark.timeout(1200),
]
IMAGE = "localhost/cyclevae:tested"  # not build.IMAGE, which others may build at the same time
USER = "123456"  # no such user, and of group 0: what OpenShift gives
LOCKED = (
    "--network=none",
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    f"--user={USER}",
    "--env=OMP_NUM_THREADS=1",
)


class Container:
    """A container that has been started; its output goes to a file."""

    def __init__(self, directory: Path, *arguments: str, options: tuple[str, ...] = ()) -> None:
        """`directory` has the volumes runs and data."""
        self.directory = directory
        self.name = f"cyclevae-test-{uuid.uuid4().hex[:8]}"
        self.output = directory / f"{self.name}.log"
        volumes = [f"--volume={directory / name}:/workspace/{name}" for name in ("runs", "data")]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["podman", "run", "--rm", f"--name={self.name}", *LOCKED, *volumes, *options, IMAGE, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=build.environment(),
            )

    @property
    def said(self) -> str:
        return self.output.read_text()

    def exit_code(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    def wait_for(self, path: Path, lines: int, seconds: float = 240) -> None:
        """Wait until a file has so many lines."""
        end = time.monotonic() + seconds
        while not path.exists() or len(path.read_text().splitlines()) < lines:
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{path} never had {lines} lines: {self.said}")
            time.sleep(0.1)

    def execute(self, *command: str) -> str:
        """Output of one more command in the container."""
        return build.run("podman", "exec", self.name, *command)

    def stop(self, grace: int) -> None:
        """SIGTERM to the first process, SIGKILL to all after `grace` seconds: what every container platform does."""
        build.run("podman", "stop", f"--time={grace}", self.name)

    def remove(self) -> None:
        if self.process.poll() is None:
            subprocess.run(
                ["podman", "rm", "--force", "--time=0", self.name], capture_output=True, env=build.environment()
            )
            self.process.wait(60)
