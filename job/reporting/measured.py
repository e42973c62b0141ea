"""Sections of a run's report that show what was measured: losses, held-out text, speed, decoding in passes."""

from __future__ import annotations

from collections.abc import Sequence

from job.metric_names import EVALUATION_BY_KEY, LOSS_TERMS, TRAINING_BY_KEY, LossTerm
from job.monitoring.curves import WEIGHTS, CurvePanel, curve_panels
from job.monitoring.evaluation_table import verdicts
from job.pages.blocks import Block, Folded, Table, Text
from job.pages.page import Section
from job.pages.plots import Plot, Points, curves
from job.reporting.run_files import PASSES, LogLine, RunFiles

TRAINING, HELD_OUT = "training", "held out"
MOST_EXPLAINED = 2  # keys of a panel with a caption
SCORES = ("t2l2t/exact_match", "l2t/exact_match"), ("t2l2t/chrf", "l2t/chrf")  # a panel of passes each


def points(log: Sequence[LogLine], key: str, x: str = "step") -> Points:
    """The values of a key in a log, against another's."""
    lines = [line for line in log if key in line and x in line]
    return [line[x] for line in lines], [line[key] for line in lines]


def words_of(key: str) -> str:
    """What a key of a log means."""
    plain, _, timestep = key.partition("@")
    if plain in EVALUATION_BY_KEY:
        words = EVALUATION_BY_KEY[plain].words.replace("{samples}", "all")
        return words.replace("at t=1", f"at t={timestep}") if timestep else words
    metric = TRAINING_BY_KEY.get(plain)
    return metric.help.rstrip(".") if metric else ""


def unit_of(keys: Sequence[str]) -> str:
    """The units of a panel's keys, without those that say nothing."""
    metrics = {**EVALUATION_BY_KEY, **TRAINING_BY_KEY}
    units = dict.fromkeys(metrics[key.partition("@")[0]].unit for key in keys if key.partition("@")[0] in metrics)
    return ", ".join(unit for unit in units if unit not in ("1", "ratio"))


def losses(run: RunFiles) -> Section:
    """Each term of the objective, on training and on held-out samples in one panel."""
    panels: list[Block] = [panel for term in LOSS_TERMS if (panel := loss_panel(run, term))]
    if not panels:
        return Section(
            "Losses", [Text(f"No log line yet; one comes every {run.config.logging.log_freq} steps.", "note")]
        )
    return Section("Losses", panels)


def loss_panel(run: RunFiles, term: LossTerm) -> Plot | None:
    """The panel of a term; None where the run does not compute it."""
    lines = {f"{TRAINING} ({term.key})": points(run.training, term.key)}
    if term.held_out:
        lines[f"{HELD_OUT} ({term.held_out})"] = points(run.evaluations, term.held_out)
    lines = {name: line for name, line in lines.items() if line[0]}
    if not points(run.training, term.key)[0]:
        return None
    caption = f"{term.words[0].upper()}{term.words[1:]}."
    if not term.held_out and term.term != "total":
        caption += " Not measured on held-out samples."
    if term.held_out == "t2l/x0_mse":
        caption += (
            f" Held out: error of the latent itself at t=1; training: of {run.config.model.latent_parameterization}"
        )
        caption += " at the timesteps of loss.latent_t_mode."
    return curves(f"{term.short}: {term.key}", lines, unit=term.unit, caption=caption)


def held_out(run: RunFiles) -> Section:
    """The last evaluation in words and figures, and how each figure changed."""
    title = "Held-out text"
    if not run.evaluations:
        every = run.config.logging.eval_freq
        moment = f"after {every} steps" if every else "at the end"
        return Section(title, [Text(f"No evaluation yet; the first one comes {moment}.", "note")])
    last = run.evaluations[-1]
    rows = [
        (metric.key, f"{last[metric.key]:.4g}", metric.words.replace("{samples}", f"{last['samples']:.0f}"))
        for metric in EVALUATION_BY_KEY.values()
        if metric.key in last and metric.key != "step"
    ]
    blocks: list[Block] = [Text(f"At step {last['step']}: {verdict}.") for verdict in verdicts(last)]
    blocks.append(
        Folded("all figures of the last evaluation", Table(("figure", "value", "meaning"), rows, numbers=(1,)))
    )
    blocks += [panel_of(panel, run.evaluations) for panel in panels_of(run, "evaluation")]
    return Section(title, blocks)


def panels_of(run: RunFiles, log: str) -> list[CurvePanel]:
    """The panels of a log that show something."""
    lines = run.evaluations if log == "evaluation" else run.training
    return [
        panel
        for panel in curve_panels(run.evaluations)
        if panel.log == log and any(key in line for line in lines for key in panel.keys)
    ]


def panel_of(panel: CurvePanel, log: Sequence[LogLine]) -> Plot:
    """A panel with all its keys; those that need no model are dashed. The table says what many of them mean."""
    lines = {key: points(log, key) for key in panel.keys}
    lines = {key: line for key, line in lines.items() if line[0]}
    floors = [key for key in lines if key.startswith("text/") or key.endswith("_data")]
    said = "; ".join(f"{key}: {words_of(key)}" for key in lines) if len(lines) <= MOST_EXPLAINED else ""
    return curves(panel.title, lines, unit=unit_of(list(lines)), caption=said, dashed=floors)


def training(run: RunFiles) -> Section:
    """Learning rate, gradients, speed, and the weights of terms that grow."""
    shown = {term.curves for term in LOSS_TERMS}
    panels = [panel for panel in panels_of(run, "training") if panel.title not in shown]
    blocks: list[Block] = []
    for panel in panels:
        plot = panel_of(panel, run.training)
        caption = "As applied, after warm-up and ramp." if panel.title == WEIGHTS else plot.caption
        blocks.append(Plot(plot.title, plot.traces, plot.layout, caption))
    return Section("Training", blocks or [Text("No log line yet.", "note")])


def passes(run: RunFiles) -> Section:
    """Exact match and chrF of round trips against the number of passes, where they were measured."""
    title = "Passes of decoding"
    if run.passes:
        return Section(title, [passes_panel(run.passes, keys) for keys in SCORES])
    if run.config.loss.text_t_mode != "random":
        text = (
            f"The run decodes in {run.config.decoding.steps} pass(es). It is trained on fully masked texts alone; more "
            "than one pass needs loss.text_t_mode=random."
        )
        return Section(title, [Text(text, "note")])
    command = f"python -m job.evaluate {run.path} --passes 1 2 4 8 16 --json > {run.path / PASSES}"
    return Section(title, [Text("Not measured yet. Measure it, and write the report again:"), Text(command, "command")])


def passes_panel(log: Sequence[LogLine], keys: Sequence[str]) -> Plot:
    """Scores against passes."""
    ordered = sorted(log, key=lambda line: line["passes"])
    lines = {key: points(ordered, key, "passes") for key in keys}
    plot = curves(
        keys[0].partition("/")[2].replace("_", " "),
        lines,
        unit=unit_of(keys),
        x_title="passes",
        caption="; ".join(f"{key}: {words_of(key)}" for key in keys),
    )
    return Plot(
        plot.title, plot.traces, {**plot.layout, "xaxis": {"title": {"text": "passes"}, "type": "log"}}, plot.caption
    )
