"""report.html: one page that tells a run, finished or not."""

from __future__ import annotations

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
