"""The process of a pod: torchrun, unless the run has been started too often without a new checkpoint.

    python -m job.launch.kubernetes.attempt RUN_DIR MAX_RESTARTS TORCHRUN_ARGUMENTS...

The training operator starts pods again as often as their exit codes ask for it. Here that is counted as the batch step does it under SLURM.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from job.errors import ExitCode
from job.files import write_json


def fruitless_restarts(run_dir: Path) -> int:
    """Note a start of the run; returns how many restarts in a row have found no new checkpoint. OSError when the directory cannot be written."""
    notes = run_dir / "kubernetes" / "attempts.json"
    newest = max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*") if path.name[5:].isdigit()), default=None)
    last = json.loads(notes.read_text()) if notes.exists() else {}
    fruitless = last["fruitless"] + 1 if last and last["checkpoint"] == newest else 0
    write_json(notes, {"checkpoint": newest, "fruitless": fruitless, "starts": last.get("starts", 0) + 1})
    return fruitless


def main() -> None:
    run_dir, most = Path(sys.argv[1]), int(sys.argv[2])
    try:
        restarts = fruitless_restarts(run_dir) if os.environ.get("CYCLEVAE_POD_INDEX", "0") == "0" else 0  # all pods are started together
    except OSError as error:
        print(f"error: {error.filename or run_dir}: {error.strerror or error}; the claim of the runs must be writable for this user or for "
              "hydra.launcher.fs_group", file=sys.stderr)
        sys.exit(ExitCode.FAILED)
    if restarts > most:
        print(f"error: {restarts - 1} restarts without a new checkpoint (max_restarts={most}); mend the cause and resume", file=sys.stderr)
        (run_dir / "kubernetes" / "attempts.json").unlink()  # the next resume counts anew
        sys.exit(ExitCode.FAILED)
    sys.argv = ["torchrun", *sys.argv[3:]]
    runpy.run_module("job.runtime.torchrun", run_name="__main__")


if __name__ == "__main__":
    main()
