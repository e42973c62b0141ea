"""`python -m job.evaluate`: the figures of a trained model on held-out samples."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from job.arguments import add_device_option, add_model_options, at_least
from job.command import guarded
from job.monitoring.evaluation_table import table
from job.objective.evaluation import evaluate
from job.runtime.precision import autocast
from job.trained import choose_device, first_batches, load_trained


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.evaluate",
        description="Evaluate a trained model, with the noise that training evaluates with.",
    )
    p.add_argument("path", type=Path, help="run directory, checkpoint, or exported model")
    p.add_argument(
        "--num-samples", type=int, action=at_least(2), help="validation samples (as many as training evaluates)"
    )
    p.add_argument("--batch-size", type=int, action=at_least(1), help="samples per pass (training.eval_batch_size)")
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_device_option(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    trained, device = load_trained(options.path, options.data, options.ema), choose_device(options.device)
    logging, training = trained.config.logging, trained.config.training
    count = options.num_samples or logging.num_eval_batches * training.eval_batch_size
    batches = first_batches(trained.held_out, trained.format, count, options.batch_size or training.eval_batch_size)
    with autocast(training.dtype, device):
        metrics = evaluate(trained.objective(device), batches, training.seed)
    if options.json:
        print(json.dumps({"step": trained.step, **metrics}))
    else:
        print(f"step {trained.step}, {table(metrics)}")


if __name__ == "__main__":
    sys.exit(guarded(main))
