"""`python -m job.evaluate`: the figures of a trained model on held-out samples."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from job.command import guarded
from job.data.loader import evaluation_batches
from job.errors import UsageError
from job.inference import choose_device, load_trained
from job.monitoring.evaluation_table import table
from job.objective.evaluation import evaluate
from job.runtime.precision import autocast


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m job.evaluate",
        description="Evaluate a trained model, with the noise that training evaluates with.",
    )
    p.add_argument("path", type=Path, help="run directory, checkpoint, or exported model")
    p.add_argument("--data", type=Path, help="prepared data directory, if not the run's own")
    p.add_argument("--num-samples", type=int, help="validation samples (as many as training evaluates)")
    p.add_argument("--batch-size", type=int, help="samples per pass (training.eval_batch_size)")
    p.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take the moving average of the weights (if there is one, as training does)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    for name, low in (("num_samples", 2), ("batch_size", 1)):
        if (value := getattr(options, name)) is not None and value < low:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give at least {low}")
    trained, device = load_trained(options.path, options.data, options.ema), choose_device(options.device)
    c = trained.config
    count = options.num_samples or c.logging.num_eval_batches * c.training.eval_batch_size
    batches = evaluation_batches(
        trained.held_out(),
        num_samples=count,
        batch_size=options.batch_size or c.training.eval_batch_size,
        rank=0,
        world_size=1,
        max_seq_len=c.model.max_seq_len,
        pad_to_max=c.data.pad_to_max,
        standardize=c.data.standardize_latents,
    )
    with autocast(c.training.dtype, device):
        metrics = evaluate(trained.trainer(device), batches, c.training.seed)
    print(json.dumps({"step": trained.step, **metrics}) if options.json else f"step {trained.step}, {table(metrics)}")


if __name__ == "__main__":
    sys.exit(guarded(main))
