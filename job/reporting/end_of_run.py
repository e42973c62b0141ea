"""The report that a run writes of itself when it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from job.reporting.latents import Latents, measure
from job.reporting.run_report import write_report
from job.training_run import TrainingRun, for_evaluation


def report_of(run: TrainingRun) -> str | None:
    """Write report.html, on rank 0; returns what to print of it, None where there is none.

    All ranks call it together, since shards are gathered here.
    """
    c = run.config
    run.reporter.count_time()
    with for_evaluation(run) as objective:
        if not run.process.is_main:
            return None
        latents = partial(
            measure,
            objective,
            run.held_out,
            run.loader.format,
            c.training.num_train_steps,
            c.training.eval_batch_size,
            c.decoding,
            c.training.seed,
        )
        return at_the_end(run.run_dir, latents)


def at_the_end(run_dir: Path, find_latents: Callable[[], Latents]) -> str | None:
    """`write_report` where a run ends. Whatever goes wrong is a warning: the run has done all its work by then.

    Returns the path and size in words, or None where there is no report.
    """
    try:
        found, why_not = find_latents(), ""
    except Exception as error:
        found, why_not = None, f"Not shown: {first_line(error)}"
    try:
        return write_report(run_dir, found=found, why_not=why_not)
    except Exception as error:
        print(
            f"warning: no report ({first_line(error)}); `python -m job.report {run_dir}` tries again", file=sys.stderr
        )
        return None


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
