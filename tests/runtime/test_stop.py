from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import start_ranks
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

from job.runtime import distributed, torchrun
from job.runtime.stop import StopSignals
from job.runtime.torchrun import FROZEN_SECONDS, exit_code

SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]


def train(max_minutes: float | None = None) -> None:
    stop = StopSignals().install()
    print("installed", flush=True)
    process = distributed.start("cpu", 20.0)
    for step in range(10**6):
        agreement = distributed.agree_meanwhile(lambda: [stop.wish(max_minutes)])
        if step == 2:
            print("running", flush=True)
        time.sleep(0.02 * (1 + process.rank))
        if reason := stop.reason(agreement()[0], max_minutes):
            print(f"stopped by {reason} at {step}, mine: {stop.requested}", flush=True)
            break
    distributed.shutdown()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, name: str) -> None:
    ranks = start_ranks(2, tmp_path, train)
    for rank in ranks:
        rank.wait_for("running")
    ranks[1].send(signal.Signals[name])
    assert [rank.exit_code() for rank in ranks] == [0, 0]
    said = [next(line for line in rank.said.splitlines() if line.startswith("stopped")) for rank in ranks]
    assert said[0].replace("None", name) == said[1]
    assert f"stopped by {name} at" in said[1]


def test_a_signal_before_the_ranks_have_met_is_kept(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path, train)
    ranks[0].wait_for("installed")
    ranks[0].send(signal.SIGTERM)
    assert [rank.exit_code() for rank in ranks] == [0, 0]
    assert "stopped by SIGTERM at" in ranks[1].said


def test_time_budget(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path, train, 0.01)
    assert [rank.exit_code() for rank in ranks] == [0, 0]
    assert "stopped by training.max_minutes=0.01 at" in ranks[1].said


def stuck_in_c(ignore: bool) -> None:
    stop = StopSignals().install()
    if ignore:
        stop.ignore_further()
    print("stuck", flush=True)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:  # a signal ends one sleep
        ctypes.CDLL(None).sleep(2)


@pytest.mark.parametrize(("second", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_second_signal_ends_even_a_process_stuck_in_c(tmp_path: Path, second: str, code: int) -> None:
    rank = start_ranks(1, tmp_path, stuck_in_c, False)[0]
    rank.wait_for("stuck")
    rank.send(signal.SIGUSR1)
    time.sleep(1.2)
    rank.send(signal.Signals[second])
    assert rank.exit_code() == code


def test_the_same_stop_by_two_ways_and_signals_after_the_save_do_not_end_it(tmp_path: Path) -> None:
    twice, late = (
        start_ranks(1, tmp_path / "a", stuck_in_c, False)[0],
        start_ranks(1, tmp_path / "b", stuck_in_c, True)[0],
    )
    for rank in (twice, late):
        rank.wait_for("stuck")
        rank.send(signal.SIGINT)
    time.sleep(0.2)
    twice.send(signal.SIGTERM)
    time.sleep(1.2)
    late.send(signal.SIGTERM)
    assert [twice.exit_code(), late.exit_code()] == [0, 0]


def forked() -> None:
    stop = StopSignals().install()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    assert stop.requested is None


def test_signal_to_a_loader_worker_is_not_ours(tmp_path: Path) -> None:
    assert start_ranks(1, tmp_path, forked)[0].exit_code() == 0


def test_a_signal_on_the_way_out_does_not_change_the_exit_code() -> None:
    """Python's exit gives signals their default back; a launcher repeats its notice until the ranks are gone."""
    code = """
import os, signal, sys
from job.runtime.stop import StopSignals
signals = StopSignals().install()
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGUSR1)
late = Late()
signals.ignore_to_the_end()
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3


def test_installing_needs_no_torch() -> None:
    code = "import sys, job.runtime.stop; job.runtime.stop.StopSignals().install(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [([143, 143], 143), ([-9], 137), ([143, 1], 1), ([134, 143], 134), ([134, 1], 1), ([2], 2), ([-15], 143)],
)
def test_exit_code_of_several_workers(codes: list[int], wanted: int) -> None:
    assert exit_code(codes) == wanted


# A worker needs no torch: it stops at a signal, half a second after it, with 143.
WORKER = """
import os, sys, time
from job.runtime.stop import StopSignals
stop = StopSignals().install()
rank, fault = os.environ["RANK"], sys.argv[1]
print("up", rank, os.getpid(), flush=True)
while not stop.requested:
    time.sleep(0.05)
    if rank == "1" and fault.isdecimal():
        sys.exit(int(fault))
time.sleep(0.5)
print("saved", rank, flush=True)
stop.ignore_further()
sys.exit(143)
"""


def wait_until(times: int, word: str, output: Path) -> None:
    end = time.monotonic() + 120
    while output.read_text().count(word) < times:
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.05)


def test_torchrun_passes_signals_and_exit_codes_on(tmp_path: Path) -> None:
    """Fault -> exit code, with a real torchrun for each, side by side."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    wanted = {"SIGTERM": 143, "SIGINT": 143, "SIGUSR1": 143, "SIGUSR2": 143, "kill": 137, "1": 1, "134": 134, "0": 143}
    runs = {}
    for fault in wanted:
        output = (tmp_path / f"{fault}.txt").open("w")
        runs[fault] = subprocess.Popen(
            [sys.executable, "-m", "job.runtime.torchrun", "--nproc-per-node", "2", str(worker), fault],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        )
    for fault, run in runs.items():
        output_file = tmp_path / f"{fault}.txt"
        wait_until(2, "up", output_file)
        if fault in SIGNALS or fault == "0":  # rank 1 ended well: the other is stopped by hand
            run.send_signal(signal.Signals[fault] if fault in SIGNALS else signal.SIGTERM)
        elif fault == "kill":
            pid = next(int(line.split()[2]) for line in output_file.read_text().splitlines() if line.startswith("up 1"))
            os.kill(pid, signal.SIGKILL)
    assert {fault: run.wait(60) for fault, run in runs.items()} == wanted
    for name in SIGNALS:
        assert (tmp_path / f"{name}.txt").read_text().count("saved") == 2


def test_a_frozen_worker_that_is_told_to_end_is_killed(tmp_path: Path) -> None:
    """Otherwise torchrun waits for it as long as a step and a save may take."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    output = tmp_path / "out.txt"
    with output.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "job.runtime.torchrun", "--nproc-per-node", "1", str(worker), "none"],
            stdout=file,
            stderr=file,
            env=os.environ
            | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"},
        )
    wait_until(1, "up", output)
    pid = next(int(line.split()[2]) for line in output.read_text().splitlines() if line.startswith("up 0"))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * FROZEN_SECONDS)
    assert run.poll() is None, "one that nobody has told to end is left alone"
    run.terminate()
    assert run.wait(60) == 137
    assert "is frozen (SIGSTOP) and was told to end: killed" in output.read_text()


def test_workers_stop_when_torchrun_is_killed(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        WORKER.replace('print("up"', 'from job.runtime import distributed\ndistributed.start("cpu", 20.0)\nprint("up"')
    )
    output = tmp_path / "out.txt"
    with output.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "job.runtime.torchrun", "--nproc-per-node", "2", str(worker), "none"],
            stdout=file,
            stderr=file,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        )
    wait_until(2, "up", output)
    run.kill()
    run.wait()
    wait_until(2, "saved", output)


def test_torchrun_whose_port_is_taken_can_be_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = ["--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={taken.getsockname()[1]}"]
        command = [sys.executable, "-m", "job.runtime.torchrun", *where, "-m", "job.train", "data=synthetic"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 134
    assert done.stderr.startswith("the nodes did not find each other: ")
    assert "Traceback" not in done.stderr


def test_a_rendezvous_that_was_closed_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node that comes while the others leave is told so by an error without a message."""

    def closed(_options: object) -> None:
        raise RendezvousClosedError

    for name in ("keep_signals_from_torchrun", "quiet_cpp_warnings", "on_signals", "watch_workers"):
        monkeypatch.setattr(torchrun, name, lambda *_: None)
    monkeypatch.setattr(torchrun, "choose_threads", lambda _: None)
    monkeypatch.setattr("torch.distributed.run.run", closed)
    assert torchrun.main(["--nnodes=1", "x.py"]) == 134
    assert capsys.readouterr().err == "the nodes did not find each other: RendezvousClosedError\n"


def test_torchrun_that_restarts_by_itself_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "job.runtime.torchrun", "--max-restarts", "3", "x.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "--max-restarts=3" in run.stderr
    assert "Traceback" not in run.stderr
