"""The run that the SLURM tests interrupt, and how it is submitted and watched."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from cluster import PrivateCluster, wait_for

ROOT = Path(__file__).parent.parent.parent
STEPS = 60
DEADLINE = 300.0  # seconds
SMALL = f"""
model=small model.hidden_size=32 model.n_blocks=1 model.n_heads=2 model.head_dim=16 model.cond_dim=32
model.max_seq_len=16 model.dropout=0.1
data=synthetic data.synthetic_samples=40 data.synthetic_vocab_size=32 data.synthetic_latent_dim=8
training.device=cpu training.num_train_steps={STEPS} training.train_batch_size=2 training.ema_decay=0.9
training.warmup_steps=10 training.eval_batch_size=4
logging.log_freq=1 logging.eval_freq=25 logging.save_freq=12 logging.num_samples=1 logging.num_eval_batches=1
""".split()
Losses = dict[int, dict[str, float]]
# Jobs that go on have a dozen states, such as SIGNALING for milliseconds.
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Slurm:
    """Jobs of a test on the cluster."""

    def __init__(self, cluster: PrivateCluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.jobs: list[str] = []

    def sbatch(
        self, name: str, *overrides: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> str:
        """Submit slurm/train.sbatch as two ranks on two nodes; returns the job's id."""
        command = [
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--gpus-per-node=0",
            f"--output={self.directory}/%j.out",
            *options,
            str(ROOT / "slurm" / "train.sbatch"),
            *SMALL,
            f"logging.save_dir={self.directory}",
            f"logging.run_name={name}",
            *overrides,
        ]
        output = subprocess.run(
            command, env=self.cluster.env | (env or {}), text=True, capture_output=True, check=True, cwd=ROOT
        ).stdout
        self.jobs.append(output.strip())
        return self.jobs[-1]

    def cancel(self) -> None:
        """End what is left of this test's jobs, and wait until their nodes are free."""
        if self.jobs:
            self.cluster.run("scancel", "--full", *self.jobs, check=False)
            wait_for(
                lambda: not self.cluster.run("squeue", "--noheader", "--jobs", ",".join(self.jobs), check=False),
                "jobs to end",
                DEADLINE,
            )

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S*)", self.cluster.run("scontrol", "show", "job", job))
        return found.group(1) if found else ""

    def sacct(self, job: str) -> list[tuple[str, str]]:
        """State and exit code of every time the job ran, as accounted."""
        lines = self.cluster.run(
            "sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode", "-j", job
        ).splitlines()
        return [(line.split("|")[0].split()[0], line.split("|")[1]) for line in lines]

    def ended(self, job: str) -> list[tuple[str, str]]:
        """Wait for a job's end; what sacct says of it, once accounting has caught up."""
        self.wait(lambda: self.field(job, "JobState") in OVER, f"job {job} to end", job)
        state = self.field(job, "JobState")
        self.wait(lambda: [line[0] for line in self.sacct(job)[-1:]] == [state], f"sacct to say {state}", job)
        return self.sacct(job)

    def wait(self, condition: Callable[[], object], what: str, job: str) -> None:
        """Wait for what must come, however busy the machine is."""
        try:
            wait_for(condition, what, DEADLINE)
        except TimeoutError as error:
            text = self.cluster.run("scontrol", "show", "job", job, check=False) + f"\nsacct: {self.sacct(job)}"
            logs = "\n".join(
                path.read_text()[-3000:]
                for path in sorted(self.directory.rglob("*.log")) + sorted(self.directory.rglob("*.out"))
            )
            raise TimeoutError(f"{error}\n{text}\n{logs}") from error

    def reached(self, name: str, step: int, job: str) -> None:
        """Wait until a run has logged a step."""
        self.wait(lambda: max(losses(self.directory / name), default=0) >= step, f"step {step}", job)


def losses(run: Path) -> dict[int, dict[str, float]]:
    """What no clock makes of a run's training log, by step."""
    path = run / "training_log.jsonl"
    lines = [json.loads(line) for line in (path.read_text().split("\n")[:-1] if path.exists() else [])]
    assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
    return {
        line["step"]: {
            name: value for name, value in line.items() if "loss" in name or name in ("lr", "grad_norm", "epoch")
        }
        for line in lines
    }


def events(run: Path) -> list[str]:
    path = run / "slurm" / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []
