"""Runs a small training job under torchrun, kills it at seeded random moments and restarts it with the same command.

It must end like a run that nothing happened to: every step's values, and every bit of the last checkpoint.

By hand, with any overrides: `python tests/runtime/chaos.py --seed 7 --kills 6 loss=random data.num_workers=1`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from job.runtime.checkpoint import open_checkpoint, read_weights

STEPS = 18
LOG_FREQ = 2  # saves, every third step, cut every second interval of the log in two
# Everything that has a state or depends on the step: accumulation, epochs ending (5 steps each), evaluation, warm-up,
# ramps, EMA, dropout, sampling.
SMALL = f"""
    model=small model.hidden_size=32 model.n_blocks=1 model.n_heads=2 model.head_dim=16 model.cond_dim=32
    model.max_seq_len=16 model.dropout=0.1
    data=synthetic data.synthetic_samples=40 data.synthetic_vocab_size=32 data.synthetic_latent_dim=8
    training.device=cpu training.num_train_steps={STEPS} training.train_batch_size=2
    training.gradient_accumulation_steps=2 training.ema_decay=0.9 training.warmup_steps=10
    training.sick_rank_timeout_seconds=120 training.eval_batch_size=4
    logging.log_freq={LOG_FREQ} logging.eval_freq=6 logging.save_freq=3 logging.num_samples=1 logging.num_eval_batches=1
""".split()
CYCLE = [
    "loss.cycle_text_warmup_steps=3",
    "loss.cycle_text_ramp_steps=8",
    "loss.cycle_latent_warmup_steps=3",
    "loss.cycle_latent_ramp_steps=8",
    "loss.cycle_latent_sampling=categorical",
]
# The ends of names whose values a clock or the machine makes.
CLOCKED = ("tokens_per_second", "_seconds", "_utilization", "_bytes")
KINDS = ("one rank", "everything", "torchrun", "SIGTERM to one rank", "SIGUSR1 to torchrun")
EXIT_CODES = {
    "one rank": {134, 137},
    "everything": {-9},
    "torchrun": {-9},
    "SIGTERM to one rank": {143},
    "SIGUSR1 to torchrun": {143},
}


class TorchrunRun:
    """A run directory and the command that works on it."""

    def __init__(self, directory: Path, overrides: list[str], world_size: int = 2) -> None:
        self.directory, self.output, self.world_size = directory, directory.with_suffix(".txt"), world_size
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.command = [
            sys.executable,
            "-m",
            "job.runtime.torchrun",
            "--nproc-per-node",
            str(world_size),
            "-m",
            "job.train",
            *SMALL,
            *overrides,
            f"logging.save_dir={directory.parent}",
            f"logging.run_name={directory.name}",
        ]

    def start(self) -> subprocess.Popen[bytes]:
        with self.output.open("ab") as output:
            return subprocess.Popen(
                self.command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
            )

    def finish(self) -> None:
        code = self.start().wait(300)
        assert code == 0, f"exit code {code}:\n{self.output.read_text()[-5000:]}"

    def log(self) -> dict[int, dict[str, float]]:
        """Lines of the training log by step, without what a clock made; without a line that a kill cut short."""
        path = self.directory / "training_log.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        values = [json.loads(line) for line in lines]
        assert len({line["step"] for line in values}) == len(values), "a step was logged twice"
        return {
            line["step"]: {name: value for name, value in line.items() if not name.endswith(CLOCKED)} for line in values
        }

    def interrupt(self, kind: str, at_step: int, delay: float, dice: random.Random) -> bool:
        """Start, do `kind` of harm `delay` seconds after step `at_step` was logged, and wait for the end.

        False when the run had finished before.
        """
        process = self.start()
        while max(self.log(), default=0) < at_step:
            if process.poll() is not None:
                assert process.returncode == 0, self.output.read_text()[-5000:]
                return False
            time.sleep(0.01)
        time.sleep(delay)
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        if process.poll() is not None or len(workers) < self.world_size:
            return False
        if kind == "one rank":
            os.kill(dice.choice(workers), signal.SIGKILL)
        elif kind == "everything":
            for pid in [process.pid, *workers]:
                os.kill(pid, signal.SIGKILL)
        elif kind == "torchrun":
            process.kill()
        elif kind == "SIGTERM to one rank":
            os.kill(dice.choice(workers), signal.SIGTERM)
        else:
            process.send_signal(signal.SIGUSR1)
        code = process.wait(300)
        assert code in EXIT_CODES[kind] | {0}, f"{kind}: exit code {code}:\n{self.output.read_text()[-5000:]}"
        return code != 0


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: equal also where both hold the same NaN, different for 0.0 and -0.0."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def chaos(parent: Path, overrides: list[str], seed: int, kinds: list[str]) -> None:
    """Assert that a run interrupted once in each of the ways `kinds` ends like one that was not."""
    dice = random.Random(seed)
    quiet, harmed = TorchrunRun(parent / "quiet", overrides), TorchrunRun(parent / "harmed", overrides)
    quiet.finish()
    expected = quiet.log()
    assert list(expected) == list(range(LOG_FREQ, STEPS + 1, LOG_FREQ))
    spread = STEPS / (len(kinds) + 1)
    for number, kind in enumerate(kinds):
        step, delay = int(dice.uniform(number, number + 1) * spread) + 2, dice.uniform(0, 0.4)
        harmful = harmed.interrupt(kind, step, delay, dice)
        reached = harmed.log()
        too_late = "" if harmful else " (too late)"
        print(
            f"seed {seed}: {kind}, {delay:.2f} s after step {step}, at step {max(reached, default=0)}{too_late}",
            flush=True,
        )
        for at, values in reached.items():
            assert values == expected[at], f"step {at} differs after {kind}: {values} instead of {expected[at]}"
    harmed.finish()
    assert harmed.log() == expected
    one, two = (read_weights(open_checkpoint(run.directory)) for run in (quiet, harmed))
    assert one.keys() == two.keys()
    different = [name for name in one if not bits(one[name]).equal(bits(two[name]))]
    assert not different, f"differ after {STEPS} steps: {different}"
    for name in ("evaluation.jsonl", "samples.jsonl"):
        logs = [(run.directory / name).read_text().splitlines() for run in (quiet, harmed)]
        lines = [[json.loads(line) for line in log] for log in logs]
        assert lines[0] == lines[1], name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    kinds = random.Random(options.seed).choices(KINDS, k=options.kills)
    with tempfile.TemporaryDirectory() as directory:
        chaos(Path(directory), options.overrides, options.seed, kinds)
    print("equal in every step and every bit")


if __name__ == "__main__":
    main()
