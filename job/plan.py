"""`cyclevae plan [OVERRIDES]`: what a run will need, before anything is queued."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from job.arguments import at_least
from job.command import composed, guarded
from job.config import Config
from job.config_checks import validate
from job.errors import UsageError
from job.files import is_url
from job.monitoring.device import BF16_PEAK, MEMORY_GIB, host_memory_limit
from job.planning.batches import FILLED, largest_fitting, refuse_none, tried
from job.planning.counts import peak_on_paper, step_work
from job.planning.data import PlannedData, planned_data
from job.planning.plan import GIB, Plan, Speed, as_text, measured_peak, plan_of
from job.trained import choose_device

NOT_PREPARED = "not-prepared-yet"  # in the place of data.dir where the data's size is said by keys of the model
NOT_COPIED = "not-copied"  # in the place of data.cache_dir: a plan reads the description in the store alone
LONG = 3.0  # seconds of a count after which its result is told; a large model's take a quarter of a minute
MFU = 0.3  # diffusion transformers and masked language models reach 0.36 to 0.48 where they are well tuned


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.plan",
        usage="python -m job.plan [--config-name NAME] [OPTIONS] OVERRIDES...",
        description="Parameters, memory, operations, time and checkpoints of the run that the same overrides train.",
    )
    p.add_argument("--config-name", "-cn", default="mmdit_cycle_vae", help="configuration to begin from (%(default)s)")
    p.add_argument("--ranks", type=int, action=at_least(1), default=1, help="processes, one a GPU (1)")
    p.add_argument("--mean-tokens", type=float, help="tokens of a text, where the data is not prepared yet")
    p.add_argument("--tokens-per-second", type=float, help="speed of the whole run, for its time")
    p.add_argument("--device", metavar="NAME", help=f"for its time and memory: {', '.join(BF16_PEAK)}")
    reached = "share of the device's peak that is reached (%(default)s; an H200: 0.34 with rows of 2048 tokens)"
    p.add_argument("--mfu", type=float, default=MFU, help=reached)
    p.add_argument("--memory-gib", type=float, help="memory that a batch must fit into, if not the device's")
    p.add_argument(
        "--try", dest="trial", action="store_true", help="find the largest batch by trial, on the device here"
    )
    p.add_argument("--json", action="store_true", help="for programs")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options, overrides = parser().parse_known_args(argv)
    refuse_options(options, overrides)
    config = composed(options.config_name, overrides)
    if config.data.source == "shards" and config.data.dir is None and config.model.vocab_size:
        config.data.dir = NOT_PREPARED
    if is_url(config.data.dir or "") and config.data.cache_dir is None:
        config.data.cache_dir = NOT_COPIED
    for warning in validate(config):
        print(f"warning: {warning}", file=sys.stderr)
    data = planned_data(config, options.mean_tokens)
    plan = dataclasses.replace(plan_of(config, data, options.ranks), speed=speed_of(options, config, data))
    if options.trial:
        plan = with_trials(plan, options, config)
    elif limit := memory_limit(options):
        plan = with_largest(plan, config, limit, options.device or f"{options.memory_gib:g} GiB")
    print(json.dumps(plan.to_values()) if options.json else as_text(plan))


def refuse_options(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """UsageError for options that are out of bounds or not known."""
    if unknown := [word for word in overrides if word.startswith("-")]:
        raise UsageError(f"{unknown[0]}: no such option; `cyclevae plan --help` lists them")
    if paths := [word for word in overrides if "/" in word.partition("=")[0] and Path(word).exists()]:
        raise UsageError(
            f"{paths[0]}: a plan is of a run that is still to be started: give the overrides that start it, KEY=VALUE; "
            "of one that is there `cyclevae report RUN` and `cyclevae doctor RUN` tell"
        )
    if options.device and options.device not in BF16_PEAK:
        raise UsageError(f"--device {options.device}: known are {', '.join(BF16_PEAK)}; else give --tokens-per-second")
    for name in ("tokens_per_second", "mfu", "memory_gib"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: give more than 0")
    if options.mfu > 1:
        raise UsageError(f"--mfu {options.mfu:g}: it is a share, at most 1")


def speed_of(options: argparse.Namespace, config: Config, data: PlannedData) -> Speed | None:
    """How fast the run is assumed to be; None where nothing says it."""
    if options.tokens_per_second:
        return Speed(options.tokens_per_second, "as given")
    if not options.device:
        return None
    work = step_work(config, data, samples=1)
    flops_per_token = work.flops / work.tokens
    peak = BF16_PEAK[options.device]
    because = (
        f"at most, if {options.ranks} x {options.device} reach {options.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s (--mfu)"
    )
    return Speed(options.ranks * options.mfu * peak / flops_per_token, because)


def memory_limit(options: argparse.Namespace) -> float | None:
    """Bytes that a rank's tensors may take; None where no memory is named."""
    size = options.memory_gib or (MEMORY_GIB[options.device] if options.device else None)
    return None if size is None else FILLED * size * GIB


def with_largest(plan: Plan, config: Config, limit: float, where: str) -> Plan:
    """The plan with the largest batch that fits on paper."""
    known = {plan.rows: plan.peak}

    def peak(rows: int) -> float:
        if rows not in known:
            start = time.monotonic()
            known[rows] = peak_on_paper(config, plan.data, rows) - plan.elsewhere
            if time.monotonic() - start > LONG:
                print(f"on paper {rows} rows take {known[rows] / GIB:.3g} GiB", file=sys.stderr, flush=True)
        return known[rows]

    rows, _ = largest_fitting(peak, limit)
    refuse_none(rows)
    return dataclasses.replace(
        plan,
        largest={"rows": rows, "where": f"{FILLED:.0%} of {where}, on paper", "limit_bytes": limit, "measured": False},
    )


def with_trials(plan: Plan, options: argparse.Namespace, config: Config) -> Plan:
    """The plan with the largest batch that fits here, found by real steps."""
    device = choose_device(config.training.device)
    if options.memory_gib:
        memory = options.memory_gib * GIB
    elif device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = host_memory_limit()
    trial = tried(config, plan.data, device)

    def told(rows: int) -> float | None:
        peak = trial(rows)  # may take minutes
        print(f"tried {rows} rows: {measured_peak(peak)}", file=sys.stderr, flush=True)
        return peak

    rows, peaks = largest_fitting(told, FILLED * memory)
    refuse_none(rows)
    where = f"{FILLED:.0%} of {memory / GIB:.4g} GiB, measured on this machine's {device.type}"
    largest = {"rows": rows, "where": where, "limit_bytes": FILLED * memory, "measured": True}
    return dataclasses.replace(plan, largest=largest, measured=peaks)


if __name__ == "__main__":
    sys.exit(guarded(main))
