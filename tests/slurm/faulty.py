"""job.train in which something goes wrong: `python faulty.py FAULT -m job.train ...`; other modules run as they are.

raise: rank 1 raises an exception in step 10.  kill: rank 1 is killed in step 10.  crash: every rank is killed before its first step.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any

fault, module = sys.argv[1], sys.argv[3]
del sys.argv[1:4]
if module != "job.train":
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()

from job import train  # noqa: E402

if fault == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
step_of_the_job = train.train_step


def train_step(job: Any, step: int, micro_batches: Any) -> None:
    if step == 10 and job.process.rank == 1:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("broken on purpose")
    step_of_the_job(job, step, micro_batches)


train.train_step = train_step
train.signals.install()
sys.exit(train.guarded(train.main))
