"""The environment variables that launchers and users set, read here and nowhere else. It needs no torch.

torchrun: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_*. srun: SLURM_*.
Arrays of tasks that know nothing of each other: SLURM_ARRAY_*; Kubernetes: JOB_COMPLETION_INDEX.
Kubeflow Trainer: KUBEFLOW_TRAINER_SERVER_*.
Launchers of this package: CYCLEVAE_STATUS_LINES, CYCLEVAE_FAILURES, CYCLEVAE_LAUNCHED, CYCLEVAE_LAST_END,
CYCLEVAE_THREADS, CYCLEVAE_STORE.
Users: CC, CXX (compilers), THP_MEM_ALLOC_ENABLE, PYTORCH_ALLOC_CONF, CUBLAS_WORKSPACE_CONFIG, OMP_NUM_THREADS,
OMP_WAIT_POLICY, GOMP_SPINCOUNT, TORCH_CPP_LOG_LEVEL, RAY_USAGE_STATS_ENABLED; LD_PRELOAD, GLIBC_TUNABLES,
MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, MALLOC_MMAP_MAX_ (memory).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from job import failure_records
from job.errors import UserError

FIRST_PORT = 10_000
PORTS = 20_000  # FIRST_PORT + PORTS stays below 32768, where Linux begins to hand out ports by itself
PORTS_OF_A_JOB = 8  # for its steps and restarts: jobs whose ids are less than PORTS / 8 apart have none in common
DEFAULT_PORT = 29_500  # torchrun's
# How often a thread of PyTorch on a CPU looks whether the others are done before it sleeps. GNU's OpenMP looks 300,000
# times, which uses up the thread's turn where another program wants the core too, so that its next piece of work waits
# for a turn: the demo on two cores that two other programs kept busy made 51 to 475 tokens a second, with 2,000 looks
# 920 to 1,120. On idle cores it is 8 to 15% slower so, since sleeping threads must be woken (never looking: 30%).
SPINS = 2_000


@dataclass(frozen=True)
class Placement:
    """Which of a run's processes this one is, and where they meet."""

    rank: int
    local_rank: int
    world_size: int
    address: str | None = None  # rendezvous host and port; None: the only process
    port: int = 0
    run_id: str = ""  # tells apart runs that meet at the same address
    by_srun: bool = False  # then rank 0 opens the port itself; torchrun's workers find it open
    address_given: bool = False  # by the user (MASTER_ADDR) and not by srun's list of nodes
    port_given: bool = False  # likewise (MASTER_PORT)


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: `gpu[07-09,12],login1` gives `gpu07`."""
    head = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def placement(environ: Mapping[str, str], alone: bool = False) -> Placement:
    """This process's placement by torchrun or srun; without either, the only process.

    Raises UserError in a SLURM batch script that asks for several tasks and starts the program without srun, unless
    the program may run `alone`.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:  # first: under `srun torchrun ...` both are set
        return Placement(
            rank=int(environ["RANK"]),
            local_rank=int(environ.get("LOCAL_RANK", 0)),
            world_size=int(environ["WORLD_SIZE"]),
            address=environ.get("MASTER_ADDR", "localhost"),
            port=int(environ.get("MASTER_PORT", DEFAULT_PORT)),
            run_id=environ.get("TORCHELASTIC_RESTART_COUNT", ""),
        )
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", 1)))
    nodelist = environ.get("SLURM_STEP_NODELIST")
    batch_script = nodelist is None and "SLURM_STEP_ID" not in environ
    if "SLURM_PROCID" not in environ or tasks == 1 or (batch_script and alone):
        return Placement(rank=0, local_rank=0, world_size=1)
    if batch_script:
        raise UserError(
            f"SLURM_NTASKS={tasks}, but this process is not one of srun's tasks: "
            "start it with `srun python -m job.train ...`"
        )
    # All tasks must compute the same port without talking to each other. A restart takes the next one: another program
    # may have the port, on a node that the job is given again.
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", 0))
    of_the_job = (step + int(environ.get("SLURM_RESTART_COUNT", 0))) % PORTS_OF_A_JOB
    return Placement(
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ.get("SLURM_LOCALID", 0)),
        world_size=tasks,
        address=environ.get("MASTER_ADDR") or first_host(nodelist or environ.get("SLURM_JOB_NODELIST", "localhost")),
        port=int(environ.get("MASTER_PORT") or FIRST_PORT + (PORTS_OF_A_JOB * job + of_the_job) % PORTS),
        run_id=f"{job}.{step}",
        by_srun=True,
        address_given=bool(environ.get("MASTER_ADDR")),
        port_given=bool(environ.get("MASTER_PORT")),
    )


def array_placement(environ: Mapping[str, str], tasks: int, host: str | None = None) -> Placement:
    """This process's placement among so many tasks of a SLURM array, or pods of an indexed Kubernetes Job.

    They have no address where they meet, and no launcher that starts or ends them together. `host` is the machine's
    name (None: it is looked up). Raises UserError where the variables do not say which task this is.
    """
    if int(environ.get("WORLD_SIZE", 1)) > 1 or int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("--array-tasks: torchrun or srun started several processes; start one in every task")
    if "SLURM_ARRAY_TASK_ID" in environ:
        number = _number_in_slurm_array(environ, tasks)
        run = f"SLURM array {environ.get('SLURM_ARRAY_JOB_ID', '')}"
    elif "JOB_COMPLETION_INDEX" in environ:
        number = int(environ["JOB_COMPLETION_INDEX"])
        # A pod of such a Job has its name and number for a host name, unless it is on the network of its node.
        run = f"Kubernetes Job {(host or socket.gethostname()).removesuffix(f'-{number}')}"
    else:
        raise UserError(
            f"--array-tasks {tasks}: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set; "
            "start this in a SLURM array (sbatch --array) or in a Kubernetes Job with completionMode: Indexed"
        )
    if number >= tasks:
        raise UserError(
            f"--array-tasks {tasks}: JOB_COMPLETION_INDEX is {number}, so there are more; give the Job's completions"
        )
    return Placement(rank=number, local_rank=0, world_size=tasks, run_id=run)


def _number_in_slurm_array(environ: Mapping[str, str], tasks: int) -> int:
    """The place of this task in its array, from 0 on; the ids need not begin there (`--array=1-15:2`)."""
    task, first, last, step, count = (
        int(environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "STEP", "COUNT")
    )
    if count != tasks:
        raise UserError(f"--array-tasks {tasks}: the SLURM array has {count} tasks; give their number")
    if first + (count - 1) * step != last or (task - first) % step:
        raise UserError(
            f"--array-tasks {tasks}: the SLURM array is no plain range ({count} tasks from {first} to {last}, step "
            f"{step}), so a task cannot tell its place; submit it as --array=0-{tasks - 1}"
        )
    return (task - first) // step


def scheduler_job_id(environ: Mapping[str, str]) -> str:
    """The SLURM job's id, or `local`: for people who look for the run at the scheduler."""
    return environ.get("SLURM_JOB_ID", "local")


def started_by_torchrun(environ: Mapping[str, str]) -> bool:
    """Whether torchrun is this process's parent."""
    return "TORCHELASTIC_RUN_ID" in environ


def tell_store_mark(mark: str | None) -> None:
    """Tell the workers that torchrun will start the mark of the store at which it meets the others (CYCLEVAE_STORE)."""
    if mark is not None:
        os.environ["CYCLEVAE_STORE"] = mark


def store_mark(environ: Mapping[str, str]) -> str | None:
    """The mark that this worker's torchrun found; None where it has looked for none."""
    return environ.get("CYCLEVAE_STORE")


def status_lines(environ: Mapping[str, str]) -> bool:
    """Whether rank 0 prints its progress as JSON lines too, for a launcher that reads it (CYCLEVAE_STATUS_LINES=1)."""
    return environ.get("CYCLEVAE_STATUS_LINES") == "1"


def trainer_server(environ: Mapping[str, str]) -> tuple[str, Path, Path | None] | None:
    """Where Kubeflow Trainer takes a run's progress, the file of the pod's token, and that of the certificate."""
    url, token = environ.get("KUBEFLOW_TRAINER_SERVER_URL"), environ.get("KUBEFLOW_TRAINER_SERVER_TOKEN")
    if not url or not token:
        return None
    certificate = environ.get("KUBEFLOW_TRAINER_SERVER_CA_CERT")
    return url, Path(token), Path(certificate) if certificate else None


def failures_file(environ: Mapping[str, str]) -> Path | None:
    """File to which every rank appends why it failed, for a launcher that reads it (CYCLEVAE_FAILURES)."""
    path = environ.get(failure_records.VARIABLE)
    return Path(path) if path else None


def launch_time(environ: Mapping[str, str]) -> float | None:
    """When the launcher began with this start, in seconds since 1970 (CYCLEVAE_LAUNCHED); None: it does not say."""
    return _number(environ.get("CYCLEVAE_LAUNCHED"))


def last_end(environ: Mapping[str, str]) -> float | None:
    """When the processes of the start before had ended, in seconds since 1970 (CYCLEVAE_LAST_END)."""
    return _number(environ.get("CYCLEVAE_LAST_END"))


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def named_compiler(environ: Mapping[str, str], variable: str) -> str | None:
    """The compiler that CC or CXX names, as torch.compile reads it."""
    return environ.get(variable)


def ranks_of_node(environ: Mapping[str, str]) -> int:
    """How many of the run's processes torchrun has started on this node."""
    return int(environ.get("LOCAL_WORLD_SIZE", 1))


def processors_of_slurm_task(environ: Mapping[str, str]) -> int | None:
    """Processors that SLURM gives to a task of this job step; None outside one, and under torchrun."""
    if "SLURM_PROCID" not in environ or "LOCAL_WORLD_SIZE" in environ:
        return None
    if "SLURM_CPUS_PER_TASK" in environ:
        return int(environ["SLURM_CPUS_PER_TASK"])
    # Tasks of every node, `2(x3),1`: three nodes of two and one of one. SLURM_NODEID counts them.
    tasks = [
        int(number)
        for number, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        for _ in range(int(nodes or 1))
    ]
    here = tasks[min(int(environ.get("SLURM_NODEID", 0)), len(tasks) - 1)]
    return max(1, int(environ.get("SLURM_CPUS_ON_NODE", here)) // here)


def choose_threads(threads: int) -> None:
    """Let PyTorch compute with so many threads, unless a number was chosen already; before torch is imported."""
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.update(OMP_NUM_THREADS=str(threads), CYCLEVAE_THREADS="ours")
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def threads_are_ours(environ: Mapping[str, str]) -> bool:
    """Whether `choose_threads` has set OMP_NUM_THREADS, and not the user."""
    return environ.get("CYCLEVAE_THREADS") == "ours"


def tune_allocators() -> None:
    """Set how PyTorch takes memory; call it before torch is imported, which reads the variables once.

    Large tensors on a CPU lie in huge pages, which takes a tenth off a step. On a GPU, segments that grow keep batches
    of ever new lengths from leaving holes that no later tensor fits into, which ends in "out of memory" beside free
    memory. A user's own variables stand. Only programs that train call it: importing a package must not change the
    environment of whoever imports it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name, which many scripts still set
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def malloc_is_tuned(environ: Mapping[str, str]) -> bool:
    """Whether the user set how malloc keeps memory, by glibc's variables (mallopt(3)) or with another allocator."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
    return any(name in environ for name in names) or "glibc.malloc" in environ.get("GLIBC_TUNABLES", "")


def let_profiler_be_silent() -> None:
    """Keep PyTorch's profiler from telling when it starts and stops; call it before its first use."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # above all of its levels


def let_products_repeat() -> None:
    """Give cuBLAS a workspace of its own for every stream, without which its products may differ from run to run.

    Call it before the first product on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def let_hydra_raise() -> None:
    """Make Hydra raise its errors, which `job.command.guarded` explains, where it would print them and exit with 1."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")


def keep_ray_quiet() -> None:
    """Before Ray is imported: no usage statistics, which it would send to its makers, unless the user wants them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def share_address(here: Placement) -> None:
    """Tell PyTorch's env:// rendezvous where the ranks meet; srun does not set its variables."""
    os.environ.update(MASTER_ADDR=str(here.address), MASTER_PORT=str(here.port))


def quiet_cpp_warnings() -> None:
    """Let PyTorch's C++ code say errors only, in this process and its workers. Call it before torch is imported.

    When the store's node goes, each process that asks it anything prints a warning with thirty lines of C++ stack,
    after which nobody finds the line that says which rank was lost. A user's own TORCH_CPP_LOG_LEVEL stands.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def keep_signals_from_torchrun() -> None:
    """Let torchrun handle only the signals that job.runtime.torchrun does not pass on itself."""
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
