"""torchrun with the exit codes of job.errors.ExitCode.

Use: `python -m job.runtime.torchrun --nproc-per-node 2 -m job.train ...`.

torchrun itself ends with 1 whatever its workers' exit codes were, dies of SIGUSR1 and SIGUSR2 leaving the workers
behind, and on SIGTERM and SIGINT kills workers that need more than 30 seconds to save. Here signals are passed on to
the workers, which end the run by themselves, and the worker's exit code becomes this program's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from job.runtime.launcher_variables import (
    choose_threads,
    keep_signals_from_torchrun,
    quiet_cpp_warnings,
    tell_store_mark,
)
from job.runtime.processors import own_threads
from job.runtime.stop import on_signals

FROZEN_SECONDS = 2.0  # between two looks for frozen workers
STOPPED = 128 + signal.SIGTERM


def _children() -> list[int]:
    """Process ids of the workers (torchrun starts them, and nothing else, from its main thread)."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _pass_on(number: int) -> None:
    workers = _children()
    if not workers:
        os.write(2, f"{signal.Signals(number).name} before the workers were started: nothing to save\n".encode())
        os._exit(STOPPED)
    for pid in workers:
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # ended in between
            continue


def is_frozen(pid: int) -> bool:
    """Whether a process was told to end and cannot: it is stopped (SIGSTOP), with SIGTERM waiting for it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # ended in between
        return False
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    waiting = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return status["State"].startswith("T") and bool(waiting & 1 << (signal.SIGTERM - 1))


def watch_workers(seen: threading.Event) -> None:
    """A thread: note that there are workers, and end those that are told to end and are frozen.

    torchrun tells its workers to end as soon as the other nodes have left the run. It gives them the time of a step and
    a save, minutes, in which a frozen one does nothing; and until it has ended, its pod is in the way of the next.
    """
    while True:
        time.sleep(FROZEN_SECONDS)
        for pid in _children():
            seen.set()
            if is_frozen(pid):
                os.write(2, f"process {pid} is frozen (SIGSTOP) and was told to end: killed\n".encode())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def exit_code(worker_codes: list[int]) -> int:
    """The run's exit code from those of its failed workers (negative: killed by that signal).

    A cause that no retry mends (below 128) comes first, then one that a retry may mend, then a stop: the run of a rank
    with bad data must not be retried because the others ended with a code that says so.
    """
    codes = [128 - code if code < 0 else code for code in worker_codes]
    return min(codes, key=lambda code: (code >= 128, code == STOPPED, code))


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns the exit code."""
    on_signals(_pass_on)  # before the imports below, which take seconds
    keep_signals_from_torchrun()
    quiet_cpp_warnings()
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import determine_local_world_size, parse_args, run

    from job.errors import ExitCode
    from job.runtime.same_store import mark_for

    options = parse_args(arguments)
    if options.max_restarts:
        print(
            f"--max-restarts={options.max_restarts}: torchrun would restart a run that was told to stop; leave it at "
            "0, restarts belong to the scheduler; see docs: explanation/how-a-run-survives",
            file=sys.stderr,
        )
        return ExitCode.USAGE
    had_workers = threading.Event()
    threading.Thread(target=watch_workers, args=(had_workers,), name="frozen workers", daemon=True).start()
    try:
        # torchrun would choose one thread where it starts several workers, and leave the other cores idle.
        choose_threads(own_threads(determine_local_world_size(options.nproc_per_node)))
        tell_store_mark(mark_for(options))
        run(options)
    except ChildFailedError as error:
        code = exit_code([failure.exitcode for failure in error.failures.values()])
        ended = ", ".join(f"rank {rank} with {failure.exitcode}" for rank, failure in sorted(error.failures.items()))
        print(f"workers ended first: {ended}; exit code {code}", file=sys.stderr)
        return code
    except (RendezvousError, DistNetworkError) as error:  # the second: for instance the port is taken
        said = next(iter(str(error).splitlines()), type(error).__name__)  # RendezvousClosedError has no message
        # The node that keeps the store may be lost while all train; most often a rank notices first, and says it above.
        what = "the nodes lost each other" if had_workers.is_set() else "the nodes did not find each other"
        print(f"{what}: {said.partition('. See inner')[0]}", file=sys.stderr)
        return ExitCode.RETRY
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
