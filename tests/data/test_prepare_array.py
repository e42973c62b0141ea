"""A preparation shared by tasks that no launcher starts together: SLURM arrays, indexed Kubernetes Jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from job.data.failed import FAILED_FILE

OPTIONS = ["--vocab-size", "300", "--latent-dim", "8", "--validation-fraction", "0.2", "--shard-size", "100"]


def slurm_task(number: int) -> dict[str, str]:
    """The variables of a task of `sbatch --array=1-5:2`."""
    array = {"JOB_ID": 77, "TASK_ID": 2 * number + 1, "TASK_MIN": 1, "TASK_MAX": 5, "TASK_STEP": 2, "TASK_COUNT": 3}
    return {f"SLURM_ARRAY_{name}": str(value) for name, value in array.items()} | {"SLURM_JOB_ID": str(80 + number)}


def start(variables: dict[str, str], out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "job.prepare", "--out", str(out), "--array-tasks", "3", *OPTIONS, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_pods_share_the_work_with_the_same_bits(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    processes = [start({"JOB_COMPLETION_INDEX": str(number)}, out, "--source", str(corpus)) for number in (2, 1, 0)]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    written = [{line.split(":")[0] for line in lines.splitlines() if line.endswith("rows")} for lines in told]
    assert all(written)
    assert sum(map(len, written)) == len(set.union(*written))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in prepared.iterdir()
    }


def test_no_task_waits_for_one_that_failed(corpus: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "dataset"
    source.write_text('{"body": "no text"}\n')
    processes = [start(slurm_task(number), out, "--source", str(source)) for number in (1, 0)]
    errors = [process.communicate()[1].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert errors[0].startswith("error: task 0 of the array failed (")
    assert errors[1] == "error: " + errors[0].partition("failed (")[2].partition("); mend that")[0]
    # Mended and requeued, with the array's number of before: whoever comes before the first task still waits for it.
    early = start(slurm_task(1), out, "--source", str(corpus))
    time.sleep(2.0)
    first = start(slurm_task(0), out, "--source", str(corpus))
    try:
        while not (out / "work" / "plan.json").exists():
            assert first.poll() is None
            time.sleep(0.01)
        assert not (out / FAILED_FILE).exists()
        assert early.poll() is None
    finally:
        for process in (early, first):
            process.kill()
            process.communicate()
