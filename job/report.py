"""`python -m job.report`: one HTML page that tells a run, also while it runs or after it was stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from job.arguments import add_device_option, add_model_options
from job.command import guarded
from job.errors import UserError
from job.reporting.latents import Latents, measure
from job.reporting.run_files import read_run
from job.reporting.run_report import NO_LATENTS, write_report
from job.runtime.precision import autocast
from job.trained import choose_device, load_trained


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.report",
        description="Write one HTML page, which needs no network, of what a run has logged so far and what its newest "
        "checkpoint makes of held-out texts. A run writes its own when it ends.",
    )
    p.add_argument("path", type=Path, metavar="RUN", help="run directory")
    p.add_argument("--out", type=Path, help="HTML file to write (report.html of the run directory)")
    p.add_argument("--no-model", action="store_true", help="leave out the latents, which need checkpoint and data")
    add_model_options(p)
    # The CPU unless told otherwise: the GPU may be full of the run that is reported on.
    add_device_option(p)
    p.set_defaults(device="cpu")
    return p


def latents_of(options: argparse.Namespace) -> Latents:
    """Latents of the run's newest checkpoint. UserError without one, or without its data."""
    trained = load_trained(options.path, options.data, options.ema, options.cache_dir)
    device = choose_device(options.device)
    c = trained.config
    with autocast(c.training.dtype, device):
        return measure(
            trained.objective(device),
            trained.held_out,
            trained.format,
            trained.step,
            c.training.eval_batch_size,
            c.decoding,
            c.training.seed,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    read_run(options.path)  # what is no run is refused as such, before a checkpoint is looked for
    found, why_not = None, NO_LATENTS
    if not options.no_model:
        try:
            found = latents_of(options)
        except UserError as error:
            if options.data is not None:
                raise
            why_not = f"Not shown: {error}."
            print(f"note: without latents: {error}", file=sys.stderr)
    print(write_report(options.path, options.out, found, why_not))


if __name__ == "__main__":
    sys.exit(guarded(main, output_is_result=False))
