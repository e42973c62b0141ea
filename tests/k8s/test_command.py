"""The container command of a PyTorchJob with the environment that the operator sets, as processes of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from k8s_node import free_ports, wait_for
from k8s_operator import environment, labels, trainer, with_defaults

from job.launch.kubernetes.manifests import Container, Run, Settings, pytorch_job

ROOT = Path(__file__).parent.parent.parent
STEPS = 24
SMALL = f"""model=small data=synthetic model.hidden_size=32 model.n_blocks=1 model.n_heads=2 model.head_dim=16 model.cond_dim=32 model.max_seq_len=16
data.synthetic_samples=40 data.synthetic_vocab_size=32 data.synthetic_latent_dim=8 training.device=cpu training.num_train_steps={STEPS}
training.global_batch_size=4 training.train_batch_size=1 model.dropout=0.1 training.warmup_steps=10 logging.log_freq=1 logging.eval_freq=0
logging.save_freq=4 logging.num_samples=1 logging.num_eval_batches=1 training.eval_batch_size=4 monitoring.enabled=false""".split()


class Pods:
    """Every replica of a job as a process, with the variables of its container."""

    def __init__(self, job: dict[str, Any], logs: Path) -> None:
        self.job, self.logs = with_defaults(job), logs
        self.port = free_ports(1)[0]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the pods that are not running, as the operator makes pods again."""
        kind, replica = next(iter(self.job["spec"]["pytorchReplicaSpecs"].items()))
        for index in range(replica["replicas"]):
            known = {f"metadata.labels['{name}']": value for name, value in labels(self.job, kind, index).items()} | {"status.podIP": "127.0.0.1"}
            container = trainer(replica["template"])
            own = {one["name"]: one["value"] if "value" in one else known[one["valueFrom"]["fieldRef"]["fieldPath"]] for one in container["env"]}
            given = {name: value.replace("run-worker-0:23456", f"127.0.0.1:{self.port}") for name, value in environment(self.job, kind, index).items()}
            command = container["command"]
            assert command[:3] == ["tini", "--", "python"]
            with (self.logs / f"{kind}-{index}.log").open("ab") as output:
                self.processes.append(subprocess.Popen(
                    [sys.executable, *command[3:]], cwd="/", stdout=output, stderr=output, start_new_session=True,
                    env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **own, **given, "OMP_NUM_THREADS": "1"}))

    def codes(self) -> list[int]:
        """Exit codes of all pods, once they have ended."""
        codes = [process.wait(120) for process in self.processes]
        self.processes.clear()
        return codes

    def said(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.logs.glob("*.log")))

    @contextmanager
    def ended_afterwards(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            print(self.said())
            raise
        finally:
            for process in self.processes:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def job_of(directory: Path) -> dict[str, Any]:
    run = Run("run", str(directory), [*SMALL, f"logging.save_dir={directory.parent}", f"logging.run_name={directory.name}"], port=None)
    made = pytorch_job(run, Settings(nodes=2, container=Container(image="cyclevae:test")))
    made["metadata"]["uid"] = "1"
    return made


def steps(run: Path) -> list[int]:
    path = run / "training_log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_a_worker_is_killed_and_the_run_goes_on_when_the_pods_are_made_again(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    (tmp_path / "logs").mkdir()
    pods = Pods(job_of(run), tmp_path / "logs")
    with pods.ended_afterwards():
        pods.start()
        wait_for(lambda: len(steps(run)) >= 9, "step 9")
        os.kill(rank(pods.processes[-1].pid), signal.SIGKILL)
        codes = pods.codes()
        assert len(codes) == 2
        assert all(code >= 128 for code in codes), "the operator retries exit codes of 128 and more"
        before = len(steps(run))
        assert before < STEPS
        pods.start()
        assert pods.codes() == [0, 0]
    assert steps(run) == list(range(1, STEPS + 1))
    assert sorted(map(int, re.findall(rf"from step (\d+) to {STEPS}", pods.said())))[1] > 0, "it went on from a checkpoint"


def rank(torchrun: int) -> int:
    """Process id of the last rank of a torchrun."""
    end = time.monotonic() + 30
    while not (children := Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()):
        assert time.monotonic() < end, "no ranks"
        time.sleep(0.1)
    return int(children[-1])
