from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from job.errors import UserError
from job.runtime.launcher_variables import (
    Placement,
    array_placement,
    failures_file,
    first_host,
    placement,
    status_lines,
)

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_ID": "41234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_JOB_NODELIST": "gpu[01-12]",
}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a[1,3]", "a1"),
        ("r[01-02]n[3-4]", "r01n3"),
        ("x-[10-11].site.org", "x-10.site.org"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_placement_without_a_launcher() -> None:
    assert placement({}) == Placement(0, 0, 1)


def test_placement_from_torchrun_comes_before_slurm() -> None:
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert placement(SLURM | torchrun) == Placement(3, 1, 4, "head", 1234)


def test_placement_from_srun() -> None:
    port = 10000 + 8 * 41234567 % 20000
    assert placement(SLURM) == Placement(5, 1, 8, "gpu07", port, "41234567.0", by_srun=True)
    given = placement(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (given.address, given.port, given.address_given, given.port_given) == ("head", 1234, True, True)


SLURM_ARRAY = {
    "SLURM_ARRAY_JOB_ID": "77",
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "7",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "4",
}


def test_placement_in_an_array() -> None:
    in_batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "80"}
    assert array_placement(SLURM_ARRAY | in_batch_script, 4) == Placement(2, 0, 4, run_id="SLURM array 77")
    pods = [array_placement({"JOB_COMPLETION_INDEX": str(n)}, 12, f"embed-1-{n}") for n in (1, 11)]
    assert pods == [Placement(n, 0, 12, run_id="Kubernetes Job embed-1") for n in (1, 11)]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set"),
        ({"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX is 4"),
        (SLURM_ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}, "the SLURM array has 3 tasks"),
        (SLURM_ARRAY | {"SLURM_ARRAY_TASK_MAX": "9"}, "submit it as --array=0-3"),
        (SLURM_ARRAY | {"SLURM_ARRAY_TASK_ID": "2"}, "submit it as --array=0-3"),
        (SLURM_ARRAY | {"RANK": "0", "WORLD_SIZE": "2"}, "started several processes"),
        (SLURM_ARRAY | {"SLURM_STEP_NUM_TASKS": "2"}, "started several processes"),
    ],
)
def test_an_array_whose_tasks_cannot_tell_their_places_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        array_placement(variables, 4)


def test_jobs_and_steps_that_share_a_node_have_different_ports() -> None:
    jobs = [*range(500, 900), 2503, 2999]  # up to 2,499 apart
    ports = {
        placement(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in jobs
        for step in range(4)
    }
    assert len(ports) == 4 * len(jobs)
    assert min(ports) >= 10000
    assert max(ports) < 32768  # where Linux's own choices begin


def test_a_restart_meets_elsewhere() -> None:
    """Another program may have the port, on a node that the job is given again."""
    ports = [placement(SLURM | {"SLURM_RESTART_COUNT": str(count)}).port for count in range(3)]
    assert len({placement(SLURM).port, *ports}) == 3


def test_single_task_and_batch_script() -> None:
    assert placement({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"}) == Placement(0, 0, 1)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a[1-2]"}
    with pytest.raises(UserError, match="srun"):
        placement(batch_script)
    assert placement(batch_script, alone=True) == Placement(0, 0, 1)
    assert placement(SLURM, alone=True) == placement(SLURM)


def test_variables_of_our_launchers() -> None:
    assert not status_lines({})
    assert not status_lines({"CYCLEVAE_STATUS_LINES": "0"})
    assert status_lines({"CYCLEVAE_STATUS_LINES": "1"})
    assert failures_file({}) is None
    assert failures_file({"CYCLEVAE_FAILURES": ""}) is None
    assert failures_file({"CYCLEVAE_FAILURES": "/runs/a/failures.jsonl"}) == Path("/runs/a/failures.jsonl")


def test_importing_the_package_changes_no_environment_variable() -> None:
    code = """
import os
for name in ("THP_MEM_ALLOC_ENABLE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
    os.environ.pop(name, None)
before = dict(os.environ)
import job
assert dict(os.environ) == before
from job.runtime.launcher_variables import tune_allocators
tune_allocators()
assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:128"
os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
tune_allocators()
assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
assert "PYTORCH_ALLOC_CONF" not in os.environ
"""
    subprocess.run([sys.executable, "-c", code], check=True)
