"""Fixtures of the SLURM tests: a cluster, jobs on it, and what a run comes to that nothing happens to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import PrivateCluster, cluster, missing_programs
from slurm_runs import ROOT, STEPS, Losses, Slurm, losses


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if "CYCLEVAE_TEST_SLURM" not in os.environ:
        why = "minutes on a private SLURM cluster: `make test-slurm`"
    elif missing_programs():
        why = f"needs {', '.join(missing_programs())}: `make slurm-tools` installs them"
    else:
        return
    for item in items:
        if here in item.path.parents and "slurm_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[PrivateCluster]:
    with cluster(max_array_size=2) as one:
        one.env.update(
            OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", CYCLEVAE_PYTHON=sys.executable, CYCLEVAE_HOME=str(ROOT)
        )
        yield one


@pytest.fixture
def slurm(slurm_cluster: PrivateCluster, tmp_path: Path) -> Iterator[Slurm]:
    one = Slurm(slurm_cluster, tmp_path)
    yield one
    one.cancel()


@pytest.fixture(scope="session")
def quiet_job(slurm_cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Slurm, str]:
    """A run that nothing happens to, and its job's id."""
    slurm = Slurm(slurm_cluster, tmp_path_factory.mktemp("quiet"))
    job = slurm.sbatch("run")
    assert slurm.ended(job) == [("COMPLETED", "0:0")]
    return slurm, job


@pytest.fixture(scope="session")
def quiet(quiet_job: tuple[Slurm, str]) -> Losses:
    """Its losses."""
    values = losses(quiet_job[0].directory / "run")
    assert list(values) == list(range(1, STEPS + 1))
    return values


@pytest.fixture(scope="session")
def overdue(
    slurm_cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Slurm, str]]]:
    """Jobs with a time limit of a minute, which passes while other tests run.

    One is of a program that stops when told to, one of a program that is deaf, and one is told as soon as it starts.
    """
    jobs = {}
    for kind in ("polite", "deaf", "saving"):
        delay = 60 if kind == "saving" else 5
        slurm = Slurm(slurm_cluster, tmp_path_factory.mktemp(kind))
        jobs[kind] = (
            slurm,
            slurm.sbatch(
                "run",
                options=("--time=1", f"--signal=B:USR1@{delay}"),
                env={
                    "CYCLEVAE_PYTHON": f"{ROOT}/tests/slurm/idle.sh {kind}",
                    "CYCLEVAE_TEST_PYTHON": sys.executable,
                    "CYCLEVAE_MAX_RESTARTS": "1",
                },
            ),
        )
    yield jobs
    for slurm, _ in jobs.values():
        slurm.cancel()
