"""`python -m job.evaluate`: the figures of a trained model on held-out samples."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import einx  # noqa: F401  # before torch: job.model.backbone says why
import torch
from torch import Tensor

from job.api import DecodingWarning, Model
from job.arguments import add_decoding_options, add_device_option, add_model_options, at_least, given_decoding
from job.checkpoint_series import checkpoints_of, every_checkpoint
from job.command import guarded
from job.config import DecodingConfig
from job.config_checks import check_decoding
from job.errors import UsageError
from job.metric_names import EVALUATION
from job.monitoring.evaluation_table import table
from job.objective.evaluation import evaluate
from job.round_trips import text_scoring
from job.runtime.precision import autocast
from job.similarity import correlation_in_words, rank_correlation, re_encoded, re_encoded_table, read_pairs
from job.trained import Trained, choose_device, first_batches, load_trained, tokenizer_of

INSTEAD = ("passes", "every", "sts")  # options that put something in the place of the table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.evaluate",
        description="Evaluate a trained model, with the noise that training evaluates with. The run may be training: "
        "it is not disturbed.",
    )
    p.add_argument("path", type=Path, help="run directory, checkpoint, or exported model")
    p.add_argument(
        "--num-samples", type=int, action=at_least(2), help="validation samples (as many as training evaluates)"
    )
    p.add_argument("--batch-size", type=int, action=at_least(1), help="samples per pass (training.eval_batch_size)")
    p.add_argument("--re-encode", action="store_true", help="also let the data's encoder judge what is decoded")
    instead = p.add_argument_group("instead of the table")
    instead.add_argument("--every", action="store_true", help="a line for every checkpoint of the run")
    instead.add_argument(
        "--passes",
        type=int,
        nargs="+",
        metavar="N",
        help="a line of scores of the decoded texts for each of these numbers of passes (decoding.steps)",
    )
    instead.add_argument(
        "--sts",
        type=Path,
        metavar="FILE",
        help="Spearman's correlation of given scores with the cosine of latents predicted from pairs of texts: .jsonl, "
        ".csv or .tsv with sentence1, sentence2, score",
    )
    add_decoding_options(p)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="print JSON, an object a line, instead of the table")
    add_device_option(p)
    return p


def refuse_together(options: argparse.Namespace) -> None:
    """UsageError for options that cannot both be meant."""
    given = [f"--{name}" for name in INSTEAD if getattr(options, name)]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} each take the place of the table; give one of them")
    if given and options.re_encode:
        raise UsageError(f"--re-encode adds to the table, and {given[0]} takes its place; give one of them")
    if options.passes and options.steps:
        raise UsageError("--steps and --passes both say how many passes; give one of them")


class Held:
    """A trained model on a device with the held-out samples that it is measured on."""

    def __init__(self, trained: Trained, device: torch.device, count: int | None, batch_size: int | None) -> None:
        config = trained.config
        self.trained, self.device = trained, device
        self.count = count or config.logging.num_eval_batches * config.training.eval_batch_size
        self.batch_size = batch_size or config.training.eval_batch_size
        self.batches = list(first_batches(trained.held_out, trained.format, self.count, self.batch_size))
        self.objective = trained.objective(device)

    def measured(self, decoding: DecodingConfig) -> dict[str, float]:
        """The metrics, with texts decoded so. Warnings go to standard error."""
        config = self.trained.config
        for warning in check_decoding(config, decoding):
            print(f"warning: {warning}", file=sys.stderr)
        config.decoding = decoding
        scoring = text_scoring(config, tokenizer_of(self.trained.held_out))
        with autocast(config.training.dtype, self.device):
            return evaluate(self.objective, self.batches, config.training.seed, scoring=scoring)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    refuse_together(options)
    pairs = read_pairs(options.sts) if options.sts else []
    directory = checkpoints_of(options.path) if options.every else None
    trained = load_trained(options.path, options.data, options.ema, options.cache_dir)
    device = choose_device(options.device)
    config = trained.config
    config.decoding = dataclasses.replace(config.decoding, **given_decoding(options))
    warnings.simplefilter("ignore", DecodingWarning)  # the model's own words for what `measured` prints
    if options.sts:
        batch_size = options.batch_size or config.training.eval_batch_size
        correlation = rank_correlation(Model(trained, device, config.training.dtype), pairs, batch_size)
        as_json = json.dumps({"step": trained.step, **correlation})
        print(as_json if options.json else correlation_in_words(trained.step, correlation))
        return
    held = Held(trained, device, options.num_samples, options.batch_size)
    if directory is not None:
        by_checkpoint(held, every_checkpoint(directory, options.ema), as_json=options.json)
        return
    if options.passes:
        # These scores are of decoded texts alone, so of all that are asked for.
        config.logging.num_generated = held.count
        by_passes(options.passes, config.decoding, held.measured, as_json=options.json)
        return
    metrics = held.measured(config.decoding)
    judged = {}
    if options.re_encode:
        judged = re_encoded(Model(trained, device, config.training.dtype), held.count, held.batch_size)
    if options.json:
        print(json.dumps({"step": trained.step, **metrics, **judged}))
        return
    print(f"step {trained.step}, {table(metrics)}")
    if judged:
        print("\n".join(re_encoded_table(judged)))


def by_checkpoint(held: Held, series: Iterable[tuple[int, dict[str, Tensor]]], *, as_json: bool) -> None:
    """Print a line of the metrics that tell most for every checkpoint, each as soon as it is measured."""
    keys = [metric.key for metric in EVALUATION if metric.headline]
    if not as_json:
        print("    step  " + "  ".join(keys))
    for step, weights in series:
        held.objective.model.load_state_dict(weights)
        metrics = held.measured(held.trained.config.decoding)
        if as_json:
            print(json.dumps({"step": step, **metrics}), flush=True)
            continue
        cells = (f"{metrics[key]:.4g}" if key in metrics else "-" for key in keys)
        print("  ".join([f"{step:8}", *map(str.ljust, cells, map(len, keys))]), flush=True)


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
