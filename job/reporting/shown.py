"""Sections of a run's report in texts and tables: what it is, samples, checkpoints, time, configuration."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from job.config import default_of, get, keys
from job.metric_names import PHASE_WORDS
from job.monitoring.progress import clock
from job.pages.blocks import Block, Cell, Facts, Folded, Table, Text, marked_differences
from job.pages.page import Section
from job.pages.plots import bars
from job.reporting.run_files import LogLine, RunFiles, when

MOST_STEPS = 12  # of samples: rows of a text's table
DIRECTIONS = {"t2l2t": "T2L2T: text → latent → text", "l2t": "L2T: from the true latent"}


def overview(run: RunFiles) -> Section:
    """What the run is, in a few facts."""
    c, made = run.config, run.environment
    processes = f"{made.get('world_size', '?')} x {made.get('gpu') or made.get('device', '?')}"
    data = c.data.dir if c.data.source == "shards" else "synthetic"
    facts: dict[str, Cell] = {
        "status": run.status,
        "directory": str(run.path.resolve()),
        "objective": c.loss.loss_type,
        "model": f"{c.model.n_blocks} blocks of width {c.model.hidden_size}",
        "data": str(data),
        "trained on": f"{run.goodput.samples:,} samples, {run.goodput.tokens:,} tokens",
        "time": clock(sum(run.goodput.seconds.values())),
        "starts": str(run.goodput.starts),
        "device": processes,
        "code": f"{made.get('version', '?')}, commit {(made.get('git_commit') or 'unknown')[:12]}",
        "Python, PyTorch": f"{made.get('python', '?')}, {made.get('packages', {}).get('torch', '?')}",
        "seed": str(c.training.seed),
    }
    blocks: list[Block] = [Facts(facts)]
    if made.get("command"):
        blocks.append(Folded("command", Text(shlex.join(made["command"]), "command")))
    return Section("Run", blocks)


def samples(run: RunFiles) -> Section:
    """How the decodings of each held-out text changed with the steps."""
    title = "Samples"
    if not run.samples:
        text = "No samples yet: logging.sample_freq says when they are made, logging.num_samples how many."
        return Section(title, [Text(text, "note")])
    log = spread(run.samples, MOST_STEPS)
    left_out = f" {len(log)} of {len(run.samples)} steps are shown." if len(log) < len(run.samples) else ""
    note = f"Held-out texts, decoded as the configuration says (decoding.*). Words that are wrong are marked.{left_out}"
    texts = [sample["text"] for sample in log[-1]["samples"]]
    folded = [Folded(text, sample_table(log, number), is_open=number < 2) for number, text in enumerate(texts)]
    return Section(title, [Text(note, "note"), *folded])


def sample_table(log: Sequence[LogLine], number: int) -> Table:
    """What became of one text at each step. A number of texts that was changed leaves gaps."""
    rows: list[list[Cell]] = []
    for line in log:
        if number >= len(line["samples"]):
            continue
        sample = line["samples"][number]
        decoded = [sample.get(direction) for direction in DIRECTIONS]
        cells = [Markup("") if text is None else marked_differences(text, sample["text"]) for text in decoded]
        rows.append([str(line["step"]), *cells])
    return Table(("step", *DIRECTIONS.values()), rows, numbers=(0,))


def spread(log: Sequence[LogLine], count: int) -> list[LogLine]:
    """At most `count` lines, evenly spread, the first and the last one among them."""
    if len(log) <= count:
        return list(log)
    return [log[round(place * (len(log) - 1) / (count - 1))] for place in range(count)]


def checkpoints(run: RunFiles) -> Section:
    """What is on disk to go on from."""
    logging = run.config.logging
    note = f"logging.keep_last={logging.keep_last} are kept, and multiples of logging.keep_every={logging.keep_every}."
    rows = [
        (str(saved.step), when(saved.saved) if saved.saved else "not whole", f"{saved.size / 1e6:,.1f} MB")
        for saved in run.checkpoints
    ]
    table: Block = Table(("step", "saved", "size"), rows, numbers=(0, 2)) if rows else Text("None on disk.")
    return Section("Checkpoints", [table, Text(note, "note")])


def time_spent(run: RunFiles) -> Section:
    """Interruptions, and where the time went."""
    g = run.goodput
    total = sum(g.seconds.values())
    if not total:
        return Section("Time and interruptions", [Text("Nothing counted yet.", "note")])
    interruptions = max(0, g.starts - 1)
    said = (
        f"Started {g.starts} time(s), so {interruptions} interruption(s); {g.replayed_steps} of {g.steps} steps were "
        f"done again after one. {g.seconds['productive'] / total:.1%} of {clock(total)} went into steps that count."
    )
    rows = [
        (phase.replace("_", " "), f"{seconds:,.1f}", f"{seconds / total:.1%}", PHASE_WORDS.get(phase, ""))
        for phase, seconds in g.seconds.items()
    ]
    shown = {phase.replace("_", " "): seconds for phase, seconds in g.seconds.items() if seconds}
    return Section(
        "Time and interruptions",
        [
            Text(said),
            bars("Where the time went", shown, unit="seconds"),
            Table(("phase", "seconds", "share", "what it is"), rows, numbers=(1, 2)),
        ],
    )


def configuration(run: RunFiles) -> Section:
    """What differs from the defaults of every key, and all the rest behind a line."""
    changed, same = [], []
    for name, declared in keys().items():
        value, default = get(run.config, name), default_of(declared)
        if value != default:
            changed.append((name, shown(value), shown(default), declared.metadata["help"]))
        else:
            same.append((name, shown(value), declared.metadata["help"]))
    return Section(
        "Configuration",
        [
            Table(("key", "value", "default", "meaning"), changed),
            Folded(f"{len(same)} keys at their default", Table(("key", "value", "meaning"), same)),
        ],
    )


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
