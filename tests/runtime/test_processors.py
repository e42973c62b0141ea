"""How many threads a rank computes with: those of the cores that it has to itself."""

from __future__ import annotations

import os
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import torch

from job.runtime import processors
from job.runtime.launcher_variables import SPINS, choose_threads, processors_of_slurm_task


def groups(directory: Path, membership: str, **files: str) -> float:
    """The quota of a process with this /proc/self/cgroup, where these files are below /sys/fs/cgroup."""
    (directory / "cgroup").write_text(membership)
    for name, text in files.items():
        path = directory / "sys" / name.replace("__", "/").replace("_cfs", ".cfs").replace("cpu_max", "cpu.max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return processors.quota(directory, directory / "sys")


def test_quota_of_a_container(tmp_path: Path) -> None:
    """The file is at the mount's root there, whatever the path is called on the host."""
    assert groups(tmp_path, "0::/kubepods/pod1/abc\n", cpu_max="250000 100000\n") == 2.5


def test_quota_of_a_group_above(tmp_path: Path) -> None:
    found = groups(tmp_path, "0::/a/b\n", a__b__cpu_max="max 100000\n", a__cpu_max="300000 100000\n")
    assert found == 3.0


def test_quota_under_version_1(tmp_path: Path) -> None:
    membership = "4:memory:/x\n3:cpu,cpuacct:/docker/abc\n0::/\n"
    files = {"cpu,cpuacct__cpu_cfs_quota_us": "150000\n", "cpu,cpuacct__cpu_cfs_period_us": "100000\n"}
    assert groups(tmp_path, membership, **files) == 1.5
    files["cpu,cpuacct__cpu_cfs_quota_us"] = "-1\n"
    assert groups(tmp_path, membership, **files) == inf


def test_no_quota(tmp_path: Path) -> None:
    assert groups(tmp_path, "0::/\n") == inf
    assert processors.quota(tmp_path / "absent") == inf


def test_hyperthreads_of_a_core_count_once(tmp_path: Path) -> None:
    for processor in range(4):
        (tmp_path / f"cpu{processor}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{processor}/topology/thread_siblings_list").write_text(f"{processor % 2},{processor % 2 + 2}")
    assert processors.cores([0, 1, 2, 3], tmp_path) == 2
    assert processors.cores([0, 2], tmp_path) == 1
    assert processors.cores([0, 9], tmp_path) == 2


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "48"}, 6),
        ({"SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_ON_NODE": "48"}, 6),
        (
            {
                "SLURM_PROCID": "6",
                "SLURM_NODEID": "3",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
                "SLURM_CPUS_ON_NODE": "4",
            },
            4,
        ),
        ({"SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "2"}, 1),
    ],
)
def test_processors_of_a_task_of_slurm(variables: dict[str, str], wanted: int | None) -> None:
    assert processors_of_slurm_task(variables) == wanted


def threads_of_a_worker(ranks: int, affinity: set[int], **variables: str) -> str:
    """OMP_NUM_THREADS of a worker that our torchrun starts where these processors may be used."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    program = ["-m", "job.runtime.torchrun", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    worker = ["sh", "-c", 'echo "threads $OMP_NUM_THREADS $CYCLEVAE_THREADS"']
    done = subprocess.run(
        [sys.executable, *program, *worker],
        env=environment | {"PYTHONPATH": os.getcwd()} | variables,
        preexec_fn=lambda: os.sched_setaffinity(0, affinity),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if "threads " in line).partition("threads ")[2]


def test_torchrun_divides_the_cores_that_may_be_used() -> None:
    everywhere = os.sched_getaffinity(0)
    assert threads_of_a_worker(1, everywhere) == f"{processors.own_threads(1)} ours"
    assert threads_of_a_worker(2, everywhere) == f"{max(1, processors.own_threads(2))} ours"
    assert threads_of_a_worker(1, {min(everywhere)}) == "1 ours"
    assert threads_of_a_worker(1, everywhere, OMP_NUM_THREADS="7") == "7 ", "a user's own number stands"


@pytest.mark.parametrize(
    ("variables", "spins"),
    [
        ({}, str(SPINS)),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_NUM_THREADS": "2"}, None),
    ],
)
def test_threads_wait_asleep_unless_the_user_says_how(
    variables: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    choose_threads(4)
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_ranks_of_one_machine_have_no_more_threads_than_it_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two pods do that each see all of a node's cores."""
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(processors, "cores", lambda _: 8)
    monkeypatch.setenv("CYCLEVAE_THREADS", "ours")
    processors.share_machine(lambda mine: [mine, mine, ("another machine", 8)])
    assert chosen == [4]
    processors.share_machine(lambda mine: [mine, ("another machine", 8)])
    assert chosen == [4], "nothing to divide"
    monkeypatch.delenv("CYCLEVAE_THREADS")
    processors.share_machine(lambda mine: [mine, mine])
    assert chosen == [4], "a user's own number stands"
