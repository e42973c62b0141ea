"""Every verdict on a machine, provoked."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from job.checks import Check, all_well, note, show, trouble, well
from job.command import guarded
from job.doctor import main
from job.health import loopback, system
from job.health.gpus import GpuFacts, gpu_checks
from job.health.loopback import loopback_check
from job.health.system import (
    Limits,
    clock_check,
    disk_checks,
    limits_check,
    lock_check,
    locks_hold,
    room_check,
    shared_memory_check,
    speed_check,
    system_checks,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("facts", "state", "words"),
    [
        (GpuFacts((), None, None, None, 0), "note", "no NVIDIA driver answers"),
        (GpuFacts((), None, "550.54", (12, 4), 8), "trouble", "has 8 GPUs, but this PyTorch is built for CPUs alone"),
        (GpuFacts((), "13.0", "550.54", (12, 4), 8), "trouble", "(CUDA 12.4) is older than the CUDA 13.0"),
        (GpuFacts((), "12.8", "550.54", (12, 4), 8), "trouble", "has 8 GPUs, but PyTorch sees none"),
        (GpuFacts(("K80",), "12.8", "550.54", (12, 4), 1, ("K80",)), "trouble", "has no kernels for K80"),
        (GpuFacts(("H100", "H100"), "12.8", "550.54", (12, 4), 2), "well", "2 x H100, driver 550.54"),
    ],
)
def test_gpus(facts: GpuFacts, state: str, words: str) -> None:
    (check,) = gpu_checks(facts)
    assert check.state == state
    assert words in check.words
    assert bool(check.remedy) == (state != "well")


def test_processes_that_sum_a_tensor() -> None:
    check = loopback_check(gpus=0)
    assert check.state == "well", check.words
    assert check.words.startswith("2 processes sum 16 MB at ")


def test_processes_that_cannot() -> None:
    """One without a GPU for NCCL, and two that are not given the time."""
    check = loopback_check(gpus=1)
    assert check.state == "trouble"
    assert check.words.startswith("1 processes cannot sum a tensor: ")
    assert loopback_check(gpus=0, seconds=0.2).words == "2 processes did not come together within 0 s"


def test_a_wrong_sum_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loopback.dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(loopback.dist, "init_process_group", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="the sum of 2 ones came out as 1"):
        loopback.main(0, "gloo", 2, 0)


@pytest.mark.parametrize(
    ("check", "state", "words"),
    [
        (shared_memory_check(None), "trouble", "/dev/shm is missing"),
        (shared_memory_check(64 << 20), "trouble", "/dev/shm has 67 MB"),
        (shared_memory_check(8 * GIB), "well", "8.0 GiB"),
        (room_check(Path("/d"), 3 * GIB, 4 * GIB), "trouble", "3.0 GiB free at /d, 4.00 GiB needed"),
        (room_check(Path("/d"), 5 * GIB, 4 * GIB), "well", "5.0 GiB free"),
        (room_check(Path("/d"), GIB // 2, 0), "trouble", "0.5 GiB free"),
        (speed_check(Path("/d"), 5e6), "trouble", "/d takes 5 MB/s"),
        (speed_check(Path("/d"), 5e8), "well", "500 MB/s"),
        (clock_check(-90.0, True), "trouble", "is 90 s behind this machine's"),
        (clock_check(90.0, None), "trouble", "is 90 s ahead of this machine's"),
        (clock_check(0.0, False), "note", "nothing synchronizes it"),
        (clock_check(0.0, True), "well", "within 0.1 s"),
        (limits_check(Limits(256, -1, -1, False)), "trouble", "256 open files at most"),
        (limits_check(Limits(4096, 100, -1, False)), "trouble", "100 processes at most"),
        (limits_check(Limits(4096, -1, 65536, True)), "trouble", "NCCL cannot use InfiniBand"),
        (limits_check(Limits(-1, -1, 65536, False)), "well", "any number of open files"),
        (lock_check(Path("/d"), None), "trouble", "files cannot be locked"),
        (lock_check(Path("/d"), False), "trouble", "does not keep another process out"),
        (lock_check(Path("/d"), True), "well", "keeps other processes"),
    ],
)
def test_verdicts(check: Check, state: str, words: str) -> None:
    assert check.state == state
    assert words in check.words
    assert bool(check.remedy) == (state != "well")


def test_limits_are_those_of_this_process() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    try:
        assert system.read_limits().files == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_place_that_cannot_be_written() -> None:
    """Also by root."""
    assert [(check.name, check.state) for check in disk_checks(Path("/proc"), 0)][-1] == ("disk", "trouble")


def test_a_lock_that_another_process_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locks_hold(tmp_path) is True
    with monkeypatch.context() as patched:
        patched.setattr(system.fcntl, "lockf", lambda *_: None)  # as on a file system whose locks are local or a lie
        assert locks_hold(tmp_path) is False

    def refused(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(system.fcntl, "lockf", refused)
    assert locks_hold(tmp_path) is None


def test_this_machine(tmp_path: Path) -> None:
    """The checks leave nothing behind; what a machine of tests may lack is no matter here."""
    checks = {check.name: check for check in system_checks(tmp_path / "not there" / "yet")}
    assert checks.keys() == {"shared memory", "room", "disk speed", "clock", "file locks", "limits"}
    assert checks["file locks"].state == "well"
    assert os.listdir(tmp_path) == []


def test_the_exit_code_says_whether_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [well("a", "is well"), note("b", "is so", "perhaps do"), trouble("c", "is bad " * 30, "do this")]
    assert all_well(checks[:2])
    assert not all_well(checks)
    show(checks, as_json=False)
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == ["well     a  is well", "note     b  is so", "            -> perhaps do"]
    assert max(map(len, told)) <= 118
    show(checks, as_json=True)
    assert [line["state"] for line in json.loads(capsys.readouterr().out)] == ["well", "note", "trouble"]


@pytest.mark.parametrize(("arguments", "code"), [(["--slurm", "--k8s"], 2), (["runs", "--k8s"], 2), (["nowhere"], 1)])
def test_a_command_line_that_cannot_be_meant(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: main(arguments)) == code
    assert len(capsys.readouterr().err.splitlines()) == 1
