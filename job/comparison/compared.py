"""Runs grouped by their settings, seeds together, and the figures of every setting against those of the first."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from job.command import unknown_key
from job.comparison import statistics
from job.comparison.runs import SEED, Run, differing, shown
from job.comparison.statistics import COVERAGE, Difference, Estimate
from job.config import keys
from job.errors import UsageError
from job.metric_names import EVALUATION, EVALUATION_BY_KEY, LOSS_TERMS, TRAINING_BY_KEY

HEADLINE = tuple(metric.key for metric in EVALUATION if metric.headline)
TERMS = {term.key: f"term {term.term} of the objective, of the last log interval" for term in LOSS_TERMS}


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone."""

    values: Mapping[str, Any]  # of the differing keys
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """The differing keys as on a command line; `all` where no key differs."""
        return " ".join(f"{key}={shown(value)}" for key, value in self.values.items()) or "all"


@dataclass(frozen=True)
class Figures:
    """What one metric says of one setting."""

    setting: Setting
    by_seed: Mapping[int, float]  # seeds that have no figure are left out
    estimate: Estimate | None  # None without any figure
    difference: Difference | None  # to the baseline over common seeds; None for the baseline, and without any


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other."""

    runs: Sequence[Run]
    keys: Sequence[str]  # in which settings differ
    by: str | None  # the key that settings are ordered by
    step: int | None  # of the figures; None: each run's last
    settings: Sequence[Setting]
    baseline: Setting
    metrics: Mapping[str, Sequence[Figures]]  # a line a setting
    notes: Sequence[str]  # what to know before one believes the figures

    def to_values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        runs = [
            {
                "run": str(run.path),
                "settings": {key: run.settings.get(key) for key in self.keys},
                "seed": run.seed,
                "step": run.steps,
                "steps": run.target_steps,
                "finished": run.finished,
                "evaluated_at": run.evaluated_at(self.step),
                "figures": {metric: run.figure(metric, self.step) for metric in self.metrics},
            }
            for run in self.runs
        ]
        metrics = {
            metric: [
                {
                    "setting": figures.setting.label,
                    "values": dict(figures.setting.values),
                    "by_seed": dict(figures.by_seed),
                    "estimate": figures.estimate and asdict(figures.estimate),
                    "difference": figures.difference and asdict(figures.difference),
                }
                for figures in lines
            ]
            for metric, lines in self.metrics.items()
        }
        return {
            "keys": list(self.keys),
            "by": self.by,
            "step": self.step,
            "baseline": self.baseline.label,
            "level": statistics.LEVEL,
            "runs": runs,
            "metrics": metrics,
            "notes": list(self.notes),
        }


def compare(
    runs: Sequence[Run],
    by: str | None = None,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    step: int | None = None,
) -> Comparison:
    """Compare runs, ordered by the key `by`; a single key that differs needs no naming.

    `baseline` is the label of the setting that others are compared with (None: the first). `step` takes the figures
    of that step. UsageError for a key, metric, setting or step that the runs do not have.
    """
    different = differing(runs)
    refuse_key(by, different)
    if by is None and len(different) == 1:
        by = different[0]
    settings = settings_of(runs, different, by)
    names = refuse_metrics(metrics, runs)
    if step is not None and not any(run.evaluated_at(step) is not None for run in runs):
        raise UsageError(f"--step {step}: no run was evaluated at it; they were at {steps_in_words(runs)}")
    if not names:
        names = [key for key in HEADLINE if any(run.figure(key, step) is not None for run in runs)]
    first = chosen_baseline(settings, baseline)
    lines = {name: [figures_of(setting, first, name, step) for setting in settings] for name in names}
    return Comparison(runs, different, by, step, settings, first, lines, notes_on(runs, settings, step))


def only_where(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs of which every `KEY=VALUE` is true. UsageError for a key that is none, or a value that no run has."""
    found = list(runs)
    for condition in conditions:
        key, separator, value = condition.partition("=")
        if not separator or key not in keys():
            why = unknown_key(key) if separator else "give KEY=VALUE"
            raise UsageError(f"--where {condition}: {why}")
        before = sorted({shown(run.settings.get(key)) for run in found})
        found = [run for run in found if shown(run.settings.get(key)) == value]
        if not found:
            raise UsageError(f"--where {condition}: no run has it; they have {key}={', '.join(before)}")
    return found


def refuse_key(by: str | None, different: Sequence[str]) -> None:
    """UsageError where the runs cannot be ordered by a key."""
    if by is None or by in different:
        return
    if by == SEED:
        raise UsageError(f"--by {SEED}: runs that differ in their seed are taken together; leave it out")
    if by not in keys():
        raise UsageError(f"--by {by}: {unknown_key(by)}")
    raise UsageError(f"--by {by}: it is the same in all runs; they differ in {', '.join(different) or 'no key'}")


def refuse_metrics(metrics: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The metrics asked for. UsageError for one that no run has."""
    known = {key for run in runs for line in (*run.evaluations[-1:], *run.training[-1:]) for key in line}
    for metric in metrics:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=2, cutoff=0.5)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"--metric {metric}: no run has logged it yet{meant}")
    return list(dict.fromkeys(metrics))


def settings_of(runs: Sequence[Run], different: Sequence[str], by: str | None) -> list[Setting]:
    """The runs by their settings, in the order of the key `by`; without one as they come."""
    groups: defaultdict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(shown(run.settings.get(key)) for key in different)].append(run)
    settings = [Setting({key: some[0].settings.get(key) for key in different}, some) for some in groups.values()]
    if by is not None:
        settings.sort(key=lambda setting: in_order(setting.values[by]))
    return settings


def in_order(value: Any) -> tuple[int, float, str]:
    """For sorting values of a key: numbers by size, then words; null comes first."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return 2, 0.0, shown(value)


def chosen_baseline(settings: Sequence[Setting], label: str | None) -> Setting:
    """The setting that others are compared with. UsageError for a label that is none, or several."""
    if label is None:
        return settings[0]
    found = [setting for setting in settings if label == setting.label or label in setting.label.split()]
    if len(found) != 1:
        labels = "; ".join(setting.label for setting in settings)
        raise UsageError(f"--baseline {label}: give one of the settings: {labels}")
    return found[0]


def figures_of(setting: Setting, baseline: Setting, metric: str, step: int | None) -> Figures:
    """One metric of one setting, and how it differs from the baseline's over the seeds that both have."""
    here = by_seed(setting, metric, step)
    found = statistics.estimate(list(here.values())) if here else None
    if setting is baseline:
        return Figures(setting, here, found, None)
    there = by_seed(baseline, metric, step)
    pairs = [(there[seed], here[seed]) for seed in sorted(here.keys() & there.keys())]
    return Figures(setting, here, found, statistics.difference(pairs) if pairs else None)


def by_seed(setting: Setting, metric: str, step: int | None) -> dict[int, float]:
    """A metric of every seed that has it. Runs of one seed count as one: they tell of no other seed."""
    found: defaultdict[int, list[float]] = defaultdict(list)
    for run in setting.runs:
        value = run.figure(metric, step)
        if value is not None:
            found[run.seed].append(value)
    return {seed: sum(values) / len(values) for seed, values in sorted(found.items())}


def notes_on(runs: Sequence[Run], settings: Sequence[Setting], step: int | None) -> list[str]:
    """What to know before one believes the figures."""
    notes = []
    unfinished = [run for run in runs if not run.finished]
    if unfinished:
        some = ", ".join(f"{run.path.name} (step {run.steps} of {run.target_steps})" for run in unfinished[:4])
        more = f" and {len(unfinished) - 4} more" if len(unfinished) > 4 else ""
        notes.append(f"not finished: {some}{more}")
    silent = [run.path.name for run in runs if run.evaluated_at(step) is None]
    if silent:
        where = "yet" if step is None else f"at step {step}"
        notes.append(f"without an evaluation {where}, so without figures of one: {', '.join(silent)}")
    reached = {run.evaluated_at(step) for run in runs} - {None}
    if len(reached) > 1:
        common = set.intersection(*({int(line["step"]) for line in run.evaluations} for run in runs if run.evaluations))
        how = f"--step {max(common)} compares them at one" if common else "no step is common to all"
        notes.append(f"the figures are of different steps ({steps_in_words(runs)}): {how}")
    for setting in settings:
        seeds = [run.seed for run in setting.runs]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            notes.append(
                f"{setting.label}: seed {twice[0]} was run {seeds.count(twice[0])} times; its mean counts once"
            )
    return notes + note_on_seeds(settings)


def note_on_seeds(settings: Sequence[Setting]) -> list[str]:
    """How far intervals of so few seeds can be trusted."""
    counts = {len({run.seed for run in setting.runs}) for setting in settings}
    if max(counts) < statistics.LEAST_VALUES:
        return [
            f"fewer than {statistics.LEAST_VALUES} seeds a setting: differences may be chance, no intervals are given"
        ]
    fewest = min(count for count in counts if count >= statistics.LEAST_VALUES)
    known = COVERAGE[max(count for count in COVERAGE if count <= fewest)]
    return [
        f"95% intervals of {fewest} seeds are too narrow: they hold the true mean in about {min(known):.0%} of cases"
    ]


def steps_in_words(runs: Sequence[Run]) -> str:
    """The steps of the runs' last evaluations."""
    found = [step for run in runs if (step := run.evaluated_at(None)) is not None]
    if not found:
        return "none"
    return str(min(found)) if min(found) == max(found) else f"{min(found)} to {max(found)}"


def words_of(metric: str) -> str:
    """What a metric is, for people; empty where the metric table does not know it."""
    plain = metric.partition("@")[0]
    if plain in EVALUATION_BY_KEY:
        return EVALUATION_BY_KEY[plain].words.replace("{samples}", "all")
    if metric in TERMS:
        return TERMS[metric]
    return TRAINING_BY_KEY[metric].help.rstrip(".") if metric in TRAINING_BY_KEY else ""
