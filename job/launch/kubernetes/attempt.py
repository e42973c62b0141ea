"""The first process of a pod: prepares data if it is asked to, becomes torchrun, and says at the end why that failed.

    python -m job.launch.kubernetes.attempt RUN_DIR MAX_RESTARTS [PREPARE_ARGUMENTS...] -- TORCHRUN_ARGUMENTS...

Without arguments, as in the TrainingRuntime of k8s/runtime, the run is called like the job (CYCLEVAE_JOB), and the
variables CYCLEVAE_ARGUMENTS and CYCLEVAE_PREPARE hold the arguments of job.train and job.prepare as a shell has them.

The training operator starts pods again as often as their exit codes ask for it, and whatever becomes of an init
container. So the limit of restarts is kept here, and data are prepared here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import runpy
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from job.errors import ExitCode, JobError, UserError
from job.failure_records import VARIABLE as FAILURES_VARIABLE
from job.failure_records import Failure, read_failures
from job.files import json_lines, write_json
from job.launch.failures import first_cause
from job.launch.kubernetes.container import MemoryGroup, diagnosis, last_step
from job.launch.kubernetes.names import (
    ARGUMENTS_VARIABLE,
    JOB_NAME_VARIABLE,
    METRICS_PORT,
    POD_INDEX_VARIABLE,
    PREPARE_VARIABLE,
    RUNS_MOUNT,
)
from job.launch.kubernetes.settings import Settings
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

    @property
    def last(self) -> Path:
        """How the last start of this pod ended (`Ending`)."""
        return self.run_dir / "kubernetes" / f"last-{self.pod_index}.json"


def attempt_of(arguments: list[str]) -> Attempt:
    """The attempt that a command line and this pod's variables describe. JobError where they describe none."""
    if not arguments:
        return _attempt_of_variables()
    split = arguments.index("--")
    return Attempt(
        run_dir=Path(arguments[0]),
        max_restarts=int(arguments[1]),
        prepare=arguments[2:split],
        torchrun=arguments[split + 1 :],
        pod_index=os.environ.get(POD_INDEX_VARIABLE, "0"),
    )


def _attempt_of_variables() -> Attempt:
    name = os.environ.get(JOB_NAME_VARIABLE)
    if not name:
        raise UserError(
            f"neither arguments nor {JOB_NAME_VARIABLE}: this is the first process of a pod; "
            "see docs: how-to/fit-a-kubernetes-cluster"
        )
    try:
        given = {key: shlex.split(os.environ.get(key, "")) for key in (ARGUMENTS_VARIABLE, PREPARE_VARIABLE)}
    except ValueError as error:  # a quotation mark is missing
        raise UserError(f"{ARGUMENTS_VARIABLE} or {PREPARE_VARIABLE}: {error}") from error
    own = [f"logging.run_name={name}", f"monitoring.port={METRICS_PORT}"]
    return Attempt(
        run_dir=Path(RUNS_MOUNT, name),
        max_restarts=Settings().max_restarts,
        prepare=given[PREPARE_VARIABLE],
        torchrun=["-m", "job.train", *given[ARGUMENTS_VARIABLE], *own],
        pod_index=os.environ.get(POD_INDEX_VARIABLE, "0"),
    )


def begin(attempt: Attempt) -> None:
    """Note the start of the run. JobError when it is given up, or when its directory cannot be written."""
    attempt.failures.parent.mkdir(parents=True, exist_ok=True)
    attempt.failures.unlink(missing_ok=True)  # of an earlier pod of this number
    cause = how_it_ended(attempt)
    write_json(attempt.last, {"ended": False, "before": cause})
    if attempt.pod_index != "0":  # all pods are started together: one of them counts
        return
    restarts = fruitless_restarts(attempt.run_dir, attempt.notes)
    if restarts > attempt.max_restarts:
        attempt.notes.unlink()  # a resume counts anew
        causes = [cause, *(note.get("cause") or note.get("before") for note in _notes_of_others(attempt))]
        why = next((f"; the last one: {text}" for text in causes if text), "")
        raise JobError(
            f"{restarts} starts in a row without a new checkpoint (max_restarts={attempt.max_restarts}){why}; "
            "mend the cause and resume"
        )
    tell_progress(attempt.run_dir)


def how_it_ended(attempt: Attempt) -> str | None:
    """Why the last start of this pod ended; None when there was none, or nothing is known of it."""
    note = _note(attempt.last)
    if note is None:
        return None
    if note["ended"]:
        return str(note["cause"]) if note["cause"] is not None else None
    limit = MemoryGroup.of_this_container().limit_in_words()
    return (
        f"its container was killed as a whole{last_step(attempt.run_dir)}, as happens when its node is lost or its "
        f"memory limit is reached ({limit}; hydra.launcher.mem_gb)"
    )


def _note(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _notes_of_others(attempt: Attempt) -> list[dict[str, Any]]:
    notes = (_note(path) for path in sorted(attempt.last.parent.glob("last-*.json")) if path != attempt.last)
    return [note for note in notes if note is not None]


def tell_progress(run_dir: Path) -> None:
    """Print where the run stands, for `status`: the pods before this one are gone, and it takes a while to go on."""
    lines = json_lines(run_dir / "training_log.jsonl")
    if lines:
        total = OmegaConf.load(run_dir / "config.yaml").training.num_train_steps
        known = {"step": lines[-1]["step"], "steps": total, "loss": lines[-1].get("loss")}
        print(json.dumps({"cyclevae": "progress", **known}), flush=True)


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
            "pod's user, or for its hydra.launcher.fs_group; see docs: reference/kubernetes"
        ) from error
    if code:
        sys.exit(code)
    choose_store_host()
    # Not in a child: the signals that Kubernetes sends to this process are torchrun's to pass on to the ranks.
    sys.argv = ["torchrun", *attempt.torchrun]
    runpy.run_module("job.runtime.torchrun", run_name="__main__")


def choose_store_host() -> None:
    """Let pod 0 alone host the store of torchrun's c10d rendezvous.

    torchrun guesses by addresses, which several pods on their node's network (hostNetwork) share. A store that another
    pod hosts outlives pod 0: it says for ever that the rendezvous is closed, and no pod 0 joins the run again.
    """
    if os.environ.get("PET_RDZV_BACKEND") != "c10d" or POD_INDEX_VARIABLE not in os.environ:
        return
    given = [part for part in os.environ.get("PET_RDZV_CONF", "").split(",") if part]
    is_host = os.environ[POD_INDEX_VARIABLE] == "0"
    if not any(part.startswith("is_host=") for part in given):
        os.environ["PET_RDZV_CONF"] = ",".join([*given, f"is_host={str(is_host).lower()}"])


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


def note_end(attempt: Attempt, failure: Failure | None) -> None:
    """Note how this start ended, for the next one, which may have to say why the run is given up."""
    with contextlib.suppress(OSError):  # must not hide the exit code
        write_json(attempt.last, {"ended": True, "cause": str(failure) if failure is not None else None})


def cause_of(attempt: Attempt, code: int, memory: MemoryGroup, kills_before: int) -> Failure | None:
    """Why this pod ended with `code`: what the container's limits did, else what the ranks recorded."""
    if code in (ExitCode.FINISHED, ExitCode.STOPPED):
        return None
    if code in (ExitCode.FAILED, ExitCode.USAGE):  # a rank has said why
        return first_cause(read_failures(attempt.failures))
    found = diagnosis(memory, kills_before, attempt.run_dir)
    if found is None:
        return first_cause(read_failures(attempt.failures))
    print(f"error: {found}", file=sys.stderr, flush=True)
    return Failure(time.time(), 0, socket.gethostname(), found, code, consequence=False)


def main() -> None:
    memory = MemoryGroup.of_this_container()
    kills = memory.kills()
    attempt: Attempt | None = None
    try:
        attempt = attempt_of(sys.argv[1:])
        train(attempt)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        failure = Failure(time.time(), 0, socket.gethostname(), str(error), int(error.exit_code), consequence=False)
        leave_message(failure)
        if attempt is not None:
            note_end(attempt, failure)
        sys.exit(error.exit_code)
    except SystemExit as end:
        assert attempt is not None
        cause = cause_of(attempt, int(end.code or 0), memory, kills)
        leave_message(cause)
        note_end(attempt, cause)
        raise


if __name__ == "__main__":
    main()
