"""job.train in which something goes wrong: `python faulty.py FAULT -m job.train ...`; other modules run as they are.

raise: rank 1 raises an exception in step 10.
kill: rank 1 is killed in step 10.
node: rank 1 is killed in step 10 on the node of the name FAULTY_NODE.
crash: every rank is killed before its first step.
kill-once: rank 1 is killed when the file FAULTY_FILE appears, in the first start only.
freeze: rank 0, which keeps the store, is stopped in step 10, in the first start only.
wait, kill-once: a run that begins at its first step takes five seconds for every step from 20 on, until it is told to
    stop.
early: what runs before the ranks in a job's first start waits for a signal.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from typing import Any

fault, module = sys.argv[1], sys.argv[3]
first_start = "SLURM_RESTART_COUNT" not in os.environ
del sys.argv[1:4]
if fault == "early" and module == "job.launch.slurm.directories" and first_start:
    print("waiting for a signal", file=sys.stderr, flush=True)
    signal.pause()
if module != "job.train" or fault == "early":
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()

from job import train  # noqa: E402

if fault == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
step_of_the_job = train.train_step
steps: list[int] = []


def train_step(job: Any, step: int, micro_batches: Any) -> None:
    if step == 10 and job.process.rank == 1 and fault in ("kill", "raise"):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("broken on purpose")
    bad_node = fault == "node" and os.environ["SLURMD_NODENAME"] == os.environ["FAULTY_NODE"]
    if step == 10 and job.process.rank == 1 and bad_node:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 10 and job.process.rank == 0 and fault == "freeze" and first_start:
        os.kill(os.getpid(), signal.SIGSTOP)
    steps.append(step)
    end = time.monotonic() + 5 * (fault in ("wait", "kill-once") and steps[0] == 0 and step >= 20)
    while time.monotonic() < end and train.signals.requested is None:
        time.sleep(0.02)
        if fault == "kill-once" and first_start and job.process.rank == 1 and os.path.exists(os.environ["FAULTY_FILE"]):
            os.kill(os.getpid(), signal.SIGKILL)
    step_of_the_job(job, step, micro_batches)


train.train_step = train_step  # type: ignore[assignment]
train.signals.install()
sys.exit(train.guarded(train.main))
