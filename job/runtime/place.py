"""Where the launcher put this process, from the variables of torchrun or SLURM. It needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from job.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where the launcher put this process."""

    rank: int
    local_rank: int
    world_size: int
    address: str | None = None  # rendezvous host and port; None: the only process
    port: int = 0
    run_id: str = ""


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: `gpu[07-09,12],login1` gives `gpu07`."""
    head = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def place(environ: Mapping[str, str], alone: bool = False) -> Place:
    """This process's place from torchrun's or srun's variables; without either, the only process.

    Raises UserError for a SLURM batch script that asks for several tasks and starts the program without srun, unless it may run `alone`.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Place(
            int(environ["RANK"]),
            int(environ.get("LOCAL_RANK", 0)),
            int(environ["WORLD_SIZE"]),
            environ.get("MASTER_ADDR", "localhost"),
            int(environ.get("MASTER_PORT", 29500)),
            environ.get("TORCHELASTIC_RESTART_COUNT", ""),
        )
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", 1)))
    nodelist = environ.get("SLURM_STEP_NODELIST")
    batch_script = nodelist is None and "SLURM_STEP_ID" not in environ
    if "SLURM_PROCID" not in environ or tasks == 1 or (batch_script and alone):
        return Place(0, 0, 1)
    if batch_script:
        raise UserError(
            f"SLURM_NTASKS={tasks}, but this process is not one of srun's tasks: start it with `srun python -m job.train ...`"
        )
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", 0))
    # Below the ports that Linux hands out by itself; jobs that share a node have ids less than 20,000 apart.
    port = int(environ.get("MASTER_PORT", 10000 + (job + 2003 * step) % 20000))
    address = environ.get("MASTER_ADDR") or first_host(nodelist or environ.get("SLURM_JOB_NODELIST", "localhost"))
    return Place(
        int(environ["SLURM_PROCID"]), int(environ.get("SLURM_LOCALID", 0)), tasks, address, port, f"{job}.{step}"
    )
