"""The process of a pod: prepares data where it is asked to, then torchrun, unless the run has been started too often without a new checkpoint.

    python -m job.launch.kubernetes.attempt RUN_DIR MAX_RESTARTS [PREPARE_ARGUMENTS...] -- TORCHRUN_ARGUMENTS...

The training operator starts pods again as often as their exit codes ask for it, and whatever becomes of an init container: so neither limit is left to it.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

from job import checkpoint_names
from job.errors import ExitCode
from job.files import write_json


def fruitless_restarts(run_dir: Path) -> int:
    """Note a start of the run; returns how many starts in a row came to training and brought no new checkpoint. Waiting for other nodes does not count.

    OSError when the directory cannot be written.
    """
    notes, description = run_dir / "kubernetes" / "attempts.json", run_dir / "environment.json"
    trained = description.stat().st_mtime if description.exists() else None  # rank 0 writes it at every start
    newest = max(checkpoint_names.steps(run_dir / checkpoint_names.DIRECTORY), default=None)
    last = json.loads(notes.read_text()) if notes.exists() else None
    fruitless = last["fruitless"] + (last["trained"] != trained) if last and last["checkpoint"] == newest else 0
    write_json(notes, {"checkpoint": newest, "trained": trained, "fruitless": fruitless})
    return fruitless


def prepare(arguments: list[str]) -> int:
    """Run job.prepare; the pods of a run take turns, and the first does the work. Returns its exit code."""
    with Path("data", ".prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.call([sys.executable, "-m", "job.prepare", *arguments])


def main() -> None:
    run_dir, most, split = Path(sys.argv[1]), int(sys.argv[2]), sys.argv.index("--")
    try:
        restarts = (
            fruitless_restarts(run_dir) if os.environ.get("CYCLEVAE_POD_INDEX", "0") == "0" else 0
        )  # all pods are started together
        if restarts > most:
            (run_dir / "kubernetes" / "attempts.json").unlink()  # a resume counts anew
            print(
                f"error: {restarts} starts in a row without a new checkpoint (max_restarts={most}); mend the cause and resume",
                file=sys.stderr,
            )
            sys.exit(ExitCode.FAILED)
        code = prepare(sys.argv[3:split]) if split > 3 else 0
    except OSError as error:
        print(
            f"error: {error.filename or run_dir}: {error.strerror or error}; the claims must be writable for the pod's user, or for its "
            "hydra.launcher.fs_group",
            file=sys.stderr,
        )
        sys.exit(ExitCode.FAILED)
    if code:
        sys.exit(code if code > 0 else 128 - code)
    sys.argv = ["torchrun", *sys.argv[split + 1 :]]
    runpy.run_module("job.runtime.torchrun", run_name="__main__")


if __name__ == "__main__":
    main()
