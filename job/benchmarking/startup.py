"""From the command to the first step, and how long steps then wait for data.

Measured on whole runs of job.train, with its files in the page cache or not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from job.data.loader import BatchFormat, BatchSplit, Loader
from job.data.sampler import Sampler
from job.data.shards import ShardDataset
from job.errors import UserError

CACHES = Path("/proc/sys/vm/drop_caches")
DEADLINE_SECONDS = 600.0


def drop_page_cache() -> bool:
    """Forget every cached file of the machine, as after a restart. False where that is not allowed (it takes root)."""
    os.sync()
    try:
        CACHES.write_text("1")
    except OSError:
        return False
    return True


def run(data: Path, overrides: list[str], steps: int, compiler_cache: str) -> dict[str, float]:
    """Seconds from the start of `python -m job.train --config-name demo` on `data` to the end of its first step.

    Of the `steps` after it: mean seconds, the part spent waiting for data, and tokens a second. UserError if the run
    fails or takes longer than DEADLINE_SECONDS.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, "-m", "job.train", "--config-name", "demo"),
            *(f"data.dir={data.absolute()}", f"logging.save_dir={directory}", "monitoring.enabled=false"),
            *("logging.log_freq=1", "logging.eval_freq=0", "logging.save_freq=0"),
            *overrides,
        ]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": compiler_cache}
        output = Path(directory) / "output"
        started = time.perf_counter()
        with (
            output.open("w") as file,
            subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process,
        ):
            try:
                first, lines = _follow(process, Path(directory) / "demo" / "training_log.jsonl", steps, started, output)
            finally:
                process.kill()
    values: list[dict[str, Any]] = [json.loads(line) for line in lines[1 : steps + 1]]
    total = sum(value["step_seconds"] for value in values)
    return {
        "first_step_seconds": first,
        "step_seconds": total / len(values),
        "data_wait": sum(value["data_wait_seconds"] for value in values) / total,
        "tokens_per_second": sum(value["tokens_per_second"] for value in values) / len(values),
    }


def _follow(
    process: subprocess.Popen[bytes], log: Path, steps: int, started: float, output: Path
) -> tuple[float, list[str]]:
    """Seconds from `started` until the log's first line, and the log's lines once it has more than `steps`."""
    first = 0.0
    while time.perf_counter() - started < DEADLINE_SECONDS:
        if process.poll() is not None:
            said = output.read_text().strip().splitlines() or ["nothing said"]
            raise UserError(f"job.train ended with {process.returncode}: {said[-1]}")
        lines = log.read_text().splitlines() if log.exists() else []
        if lines and not first:
            first = time.perf_counter() - started
        if len(lines) > steps:
            return first, lines
        time.sleep(0.02)
    raise UserError(f"job.train made no {steps + 1} steps in {DEADLINE_SECONDS:.0f} s")


def loader_rate(data: Path, batch_size: int = 32, steps: int = 200) -> float:
    """Tokens a second that the loader makes of `data` in one process, without training beside it."""
    dataset = ShardDataset(data, "train")
    sampler = Sampler(dataset, len(dataset), batch_size, seed=0)
    loader = Loader(dataset, sampler, BatchFormat(dataset.info.max_length), BatchSplit(0, 1, batch_size))
    started = time.perf_counter()
    tokens = sum(int(batch["attention_mask"].sum()) for batches in loader.steps(0, steps) for batch in batches)
    return tokens / (time.perf_counter() - started)


def compare(data: Path, steps: int) -> dict[str, dict[str, float]]:
    """Figures of `run` by how it starts.

    With an empty page cache, with a warm one, and compiled: a first time, and again with the compiler's cache.
    """
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        if drop_page_cache():
            figures["cold"] = run(data, [], steps, cache)
        else:
            print("cold: left out, only root may empty the page cache")
            run(data, [], 1, cache)
        figures["warm"] = run(data, [], steps, cache)
        for name in ("compiled, first time", "compiled, again"):
            figures[name] = run(data, ["training.compile_model=true"], steps, cache)
    return figures
