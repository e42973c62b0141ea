"""report.html: one page that tells a run, finished or not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from job.pages.page import Page, Section, write_page
from job.reporting import latents, measured, shown
from job.reporting.latents import Latents
from job.reporting.run_files import read_run, when

REPORT = "report.html"  # of the run directory
NO_LATENTS = "Not shown: the report was written without the model (--no-model)."


def write_report(
    run_dir: Path, out: Path | None = None, found: Latents | None = None, why_not: str = NO_LATENTS
) -> str:
    """Write the report of a run into its directory or to `out`; returns its path and size in words.

    `found` are the model's latents; without them the page says `why_not`. UserError for a directory without a run.
    """
    out = out or run_dir / REPORT
    run = read_run(run_dir)
    sections: list[Section] = [
        shown.overview(run),
        measured.losses(run),
        measured.held_out(run),
        shown.samples(run),
        measured.passes(run),
        latents.section(found, why_not),
        measured.training(run),
        shown.time_spent(run),
        shown.checkpoints(run),
        shown.configuration(run),
    ]
    made = f"Written {when(datetime.now(UTC))}; write it anew with: python -m job.report {run_dir}"
    size = write_page(out, Page(run.name, run.status, sections, [made]))
    return f"{out} ({size / 1e6:.1f} MB)"


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
