"""From the command to the first step, and how long steps then wait for data: whole runs of job.train, with files cached or not."""

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


def run(data: Path, overrides: list[str], steps: int) -> dict[str, float]:
    """Seconds from the start of `python -m job.train --config-name demo` on `data` to the end of its first step, and of the steps after it
    the mean time, the part spent waiting for data, and tokens a second. UserError if the run fails."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-m",
            "job.train",
            "--config-name",
            "demo",
            f"data.dir={data.absolute()}",
            f"logging.save_dir={directory}",
            "logging.log_freq=1",
            "logging.eval_freq=0",
            "logging.save_freq=0",
            "monitoring.enabled=false",
            *overrides,
        ]
        log = Path(directory) / "demo" / "training_log.jsonl"
        started = time.perf_counter()
        first = 0.0
        lines: list[str] = []
        with (
            (Path(directory) / "output").open("w+") as output,
            subprocess.Popen(command, stdout=output, stderr=output) as process,
        ):
            while len(lines) <= steps and time.perf_counter() - started < DEADLINE_SECONDS:
                if process.poll() is not None:
                    output.seek(0)
                    raise UserError(
                        f"job.train ended with {process.returncode}: {output.read().strip().splitlines()[-1]}"
                    )
                lines = log.read_text().splitlines() if log.exists() else []
                first = first or (time.perf_counter() - started if lines else 0.0)
                time.sleep(0.02)
            process.kill()
    values: list[dict[str, Any]] = [json.loads(line) for line in lines[1 : steps + 1]]
    total = sum(value["step_seconds"] for value in values)
    return {
        "first_step_seconds": first,
        "step_seconds": total / len(values),
        "data_wait": sum(value["data_wait_seconds"] for value in values) / total,
        "tokens_per_second": sum(value["tokens_per_second"] for value in values) / len(values),
    }


def loader_rate(data: Path, batch_size: int = 32, steps: int = 200) -> float:
    """Tokens a second that the loader makes of `data` in one process, without training beside it."""
    dataset = ShardDataset(data, "train")
    sampler = Sampler(dataset, len(dataset), batch_size, seed=0)
    loader = Loader(dataset, sampler, BatchFormat(dataset.info.max_length), BatchSplit(0, 1, batch_size))
    started = time.perf_counter()
    tokens = sum(int(batch["attention_mask"].sum()) for batches in loader.steps(0, steps) for batch in batches)
    return tokens / (time.perf_counter() - started)


def compare(data: Path, steps: int) -> dict[str, dict[str, float]]:
    """Figures of `run` with an empty page cache, a warm one, and compiled (a first time, and again with the compiler's cache)."""
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        if drop_page_cache():
            figures["cold"] = run(data, [], steps)
        else:
            print("cold: left out, only root may empty the page cache")
            run(data, [], 1)
        figures["warm"] = run(data, [], steps)
        for name in ("compiled, first time", "compiled, again"):
            figures[name] = run(data, ["training.compile_model=true"], steps)
    return figures
