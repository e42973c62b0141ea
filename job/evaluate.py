"""`python -m job.evaluate`: the figures of a trained model on held-out samples."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from job.arguments import add_decoding_options, add_device_option, add_model_options, at_least, given_decoding
from job.command import guarded
from job.config import DecodingConfig
from job.config_checks import check_decoding
from job.errors import UsageError
from job.monitoring.evaluation_table import table
from job.objective.evaluation import evaluate
from job.round_trips import text_scoring
from job.runtime.precision import autocast
from job.trained import choose_device, first_batches, load_trained, tokenizer_of


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
    p.add_argument(
        "--passes",
        type=int,
        nargs="+",
        metavar="N",
        help="instead: a line of scores of the decoded texts for each of these numbers of passes (decoding.steps)",
    )
    add_decoding_options(p)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="print JSON, an object a line, instead of the table")
    add_device_option(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    trained, device = load_trained(options.path, options.data, options.ema), choose_device(options.device)
    config = trained.config
    if options.passes and options.steps:
        raise UsageError("--steps and --passes both say how many passes; give one of them")
    config.decoding = dataclasses.replace(config.decoding, **given_decoding(options))
    count = options.num_samples or config.logging.num_eval_batches * config.training.eval_batch_size
    batches = list(
        first_batches(trained.held_out, trained.format, count, options.batch_size or config.training.eval_batch_size)
    )
    objective = trained.objective(device)
    if options.passes:
        config.logging.num_generated = count  # these scores are of decoded texts alone, so of all that are asked for

    def measured(decoding: DecodingConfig) -> dict[str, float]:
        for warning in check_decoding(config, decoding):
            print(f"warning: {warning}", file=sys.stderr)
        config.decoding = decoding
        scoring = text_scoring(config, tokenizer_of(trained.held_out))
        with autocast(config.training.dtype, device):
            return evaluate(objective, batches, config.training.seed, scoring=scoring)

    if options.passes:
        by_passes(options.passes, config.decoding, measured, as_json=options.json)
        return
    metrics = measured(config.decoding)
    if options.json:
        print(json.dumps({"step": trained.step, **metrics}))
    else:
        print(f"step {trained.step}, {table(metrics)}")


def by_passes(
    passes: Sequence[int],
    decoding: DecodingConfig,
    measured: Callable[[DecodingConfig], dict[str, float]],
    *,
    as_json: bool,
) -> None:
    """Print scores of round trips (T2L2T) for numbers of passes, and the seconds that each evaluation took."""
    if not as_json:
        print("passes  tokens right  whole texts   BLEU   chrF  repeats  distinct-2  seconds")
    for steps in passes:
        started = time.perf_counter()
        metrics = measured(dataclasses.replace(decoding, steps=steps))
        seconds = time.perf_counter() - started
        if as_json:
            print(json.dumps({"passes": steps, "seconds": seconds, **metrics}), flush=True)
            continue
        scores = {key.removeprefix("t2l2t/"): value for key, value in metrics.items()}
        print(
            "{steps:6}  {decoded_token_acc:12.1%}  {exact_match:11.1%}  {bleu:5.1f}  {chrf:5.1f}  {repeats:7.1%}  "
            "{distinct_2:10.1%}  {seconds:7.1f}".format(steps=steps, seconds=seconds, **scores),
            flush=True,
        )
    if not as_json:
        print(f"  true{'':43}{metrics['text/repeats']:7.1%}  {metrics['text/distinct_2']:10.1%}")


if __name__ == "__main__":
    sys.exit(guarded(main))
