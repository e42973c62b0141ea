"""The first process of a pod: prepares data if it is asked to, becomes torchrun, and says at the end why that failed.

    python -m job.launch.kubernetes.attempt RUN_DIR MAX_RESTARTS [PREPARE_ARGUMENTS...] -- TORCHRUN_ARGUMENTS...

The training operator starts pods again as often as their exit codes ask for it, and whatever becomes of an init
container. So the limit of restarts is kept here, and data are prepared here.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from job.errors import ExitCode, JobError
from job.failure_records import VARIABLE as FAILURES_VARIABLE
from job.failure_records import Failure, read_failures
from job.launch.failures import first_cause
from job.launch.kubernetes.names import POD_INDEX_VARIABLE
from job.launch.kubernetes.status_lines import STATUS_LINES_VARIABLE
from job.launch.restarts import fruitless_restarts

TERMINATION_LOG = Path("/dev/termination-log")  # what is in it becomes the container's state.terminated.message
LONGEST_MESSAGE = 800  # characters; Kubernetes keeps 4096 bytes of the file


@dataclass(frozen=True)
class Attempt:
    """One start of a pod."""

    run_dir: Path
    max_restarts: int
    prepare: list[str]  # arguments of job.prepare; none: the data are there
    torchrun: list[str]  # arguments of torchrun
    pod_index: str

    @property
    def notes(self) -> Path:
        """What the run's starts have come to (job.launch.restarts)."""
        return self.run_dir / "kubernetes" / "attempts.json"

    @property
    def failures(self) -> Path:
        """Where the processes of this pod say why they failed; its own file, so that it can begin by removing it."""
        return self.run_dir / "kubernetes" / f"failures-{self.pod_index}.jsonl"


def attempt_of(arguments: list[str]) -> Attempt:
    """The attempt that a command line and this pod's variables describe."""
    split = arguments.index("--")
    return Attempt(
        run_dir=Path(arguments[0]),
        max_restarts=int(arguments[1]),
        prepare=arguments[2:split],
        torchrun=arguments[split + 1 :],
        pod_index=os.environ.get(POD_INDEX_VARIABLE, "0"),
    )


def begin(attempt: Attempt) -> None:
    """Note the start of the run. JobError when it is given up, or when its directory cannot be written."""
    attempt.failures.parent.mkdir(parents=True, exist_ok=True)
    attempt.failures.unlink(missing_ok=True)  # of an earlier pod of this number
    if attempt.pod_index != "0":  # all pods are started together: one of them counts
        return
    restarts = fruitless_restarts(attempt.run_dir, attempt.notes)
    if restarts > attempt.max_restarts:
        attempt.notes.unlink()  # a resume counts anew
        raise JobError(
            f"{restarts} starts in a row without a new checkpoint (max_restarts={attempt.max_restarts}); "
            "mend the cause and resume"
        )


def prepare(arguments: list[str]) -> int:
    """Run job.prepare; the pods of a run take turns, and the first does the work. Returns the exit code."""
    with Path("data", ".prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = subprocess.call([sys.executable, "-m", "job.prepare", *arguments])
    return code if code >= 0 else 128 - code  # killed by a signal


def train(attempt: Attempt) -> None:
    """Everything of a pod, in this process; ends by SystemExit. JobError for what no rank can report."""
    os.environ[FAILURES_VARIABLE] = str(attempt.failures)
    os.environ[STATUS_LINES_VARIABLE] = "1"
    try:
        begin(attempt)
        code = prepare(attempt.prepare) if attempt.prepare else ExitCode.FINISHED
    except OSError as error:
        raise JobError(
            f"{error.filename or attempt.run_dir}: {error.strerror or error}; the claims must be writable for the "
            "pod's user, or for its hydra.launcher.fs_group"
        ) from error
    if code:
        sys.exit(code)
    # Not in a child: the signals that Kubernetes sends to this process are torchrun's to pass on to the ranks.
    sys.argv = ["torchrun", *attempt.torchrun]
    runpy.run_module("job.runtime.torchrun", run_name="__main__")


def leave_message(failure: Failure | None) -> None:
    """Write a failure where Kubernetes reads it, as JSON; nothing outside a pod.

    The run directory is out of a launcher's reach; this message is a part of the pod's status.
    """
    if failure is None or not TERMINATION_LOG.exists():
        return
    short = replace(failure, message=failure.message[:LONGEST_MESSAGE])
    try:
        TERMINATION_LOG.write_text(json.dumps(asdict(short), ensure_ascii=False))
    except OSError as error:  # must not hide the exit code
        print(f"{TERMINATION_LOG}: {error}", file=sys.stderr)


def main() -> None:
    attempt = attempt_of(sys.argv[1:])
    try:
        train(attempt)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave_message(
            Failure(time.time(), 0, socket.gethostname(), str(error), int(error.exit_code), consequence=False)
        )
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code:
            leave_message(first_cause(read_failures(attempt.failures)))
        raise


if __name__ == "__main__":
    main()
