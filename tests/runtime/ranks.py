"""Runs functions as the real ranks of a run: processes with torchrun's variables, gloo and their own stdout."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import JobError
from job.runtime import distributed

# Children are forked from a server that has imported PyTorch but never ran anything: quick to start and clean.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "job.runtime.checkpointer",
        "job.runtime.watchdog",
        "job.runtime.stop",
        "torch.distributed.tensor",
        "hypothesis",
        "pytest",
    ]
)


def _main(function: Callable[..., Any], arguments: tuple[Any, ...], output: Path, variables: dict[str, str]) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments)
        code = 0
    except JobError as error:
        print(error)
        code = int(error.exit_code)
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    if code:
        distributed.leave(code)
    os._exit(0)


@dataclass
class Rank:
    process: Any
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end, f"{text!r} never came: {self.said}"
            assert self.process.exitcode is None or text in self.said, f"ended before {text!r}: {self.said}"
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def exit_code(self, seconds: float = 60) -> int:
        """Exit code; negative: killed by that signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running: {self.said}")
        return int(self.process.exitcode)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def start_ranks(world_size: int, directory: Path, function: Callable[..., Any], *arguments: Any) -> list[Rank]:
    """Start `function(*arguments)` on every rank; distributed.start() inside it joins them."""
    directory.mkdir(parents=True, exist_ok=True)
    port, ranks = free_port(), []
    for rank in range(world_size):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        output = directory / f"rank{rank}_{port}.txt"
        process = _context.Process(
            target=_main, args=(function, arguments, output, variables if world_size > 1 else {}), daemon=True
        )
        process.start()
        ranks.append(Rank(process, output))
    return ranks


def run_ranks(world_size: int, directory: Path, function: Callable[..., Any], *arguments: Any) -> list[str]:
    """What every rank said; all must end well."""
    ranks = start_ranks(world_size, directory, function, *arguments)
    codes = [rank.exit_code() for rank in ranks]
    assert codes == [0] * world_size, "\n".join(rank.said for rank in ranks)
    return [rank.said for rank in ranks]
