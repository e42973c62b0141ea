"""When a run is given up: after `max_restarts` restarts in a row without a new checkpoint.

A run may be restarted for months, by time limits and preemption, as long as it comes forward. One that fails at the
same place again and again must not be started for ever. The rule for all launchers:

- Counted are restarts from the same newest checkpoint. Another one begins a new count; an unfinished one does not.
- Every restart counts, whatever ended the start before it: a crash, a lost node, a signal.
- After max_restarts restarts from one checkpoint the run is not restarted again: it has failed.
- Submitting or resuming the run counts anew.

The rule stands twice. SLURM's batch step (slurm/batch.sh, `requeue`) applies it at the end of a start and has nothing
but bash, also where Python lives in a container. Kubernetes makes pods again by itself, so there the first pod
applies it when it begins, with the function below. Two things follow from that, and SLURM's time limits ask for a
third; there are no other differences:

- A pod cannot tell a restart from a resume, so the first start from a new checkpoint never counts. From each new
  checkpoint a run has one start more on Kubernetes than on SLURM.
- Pods are also made again while other nodes are missing. A start that ended before its ranks met does not count there.
  A SLURM job begins with all its nodes.
- Where SLURM's warning comes with every start, each start saves a step, which is a new checkpoint. There starts that
  are told to stop within a minute count too: after max_restarts of them in a row the run is given up.

tests/launch/test_restarts.py puts both to the same table of cases.
"""

from __future__ import annotations

import json
from pathlib import Path

from job import checkpoint_names
from job.files import write_json


def fruitless_restarts(run_dir: Path, notes: Path) -> int:
    """Note that a run begins; returns how many restarts in a row have brought no new checkpoint, this one included.

    `notes` is the file that keeps the count from start to start: the newest checkpoint and the time at which ranks last
    met, as of the last start, and the count. OSError when it cannot be written.
    """
    description = run_dir / "environment.json"  # rank 0 writes it at every start, when the ranks have met
    met = description.stat().st_mtime if description.exists() else None
    newest = max(checkpoint_names.steps(run_dir / checkpoint_names.DIRECTORY), default=None)
    last = json.loads(notes.read_text()) if notes.exists() else None
    count = 0
    if last is not None and last["checkpoint"] == newest:
        count = last["fruitless"] + (last["trained"] != met)
    write_json(notes, {"checkpoint": newest, "trained": met, "fruitless": count})
    return count
