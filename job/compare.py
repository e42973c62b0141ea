"""`cyclevae compare RUN...|SWEEP_DIR`: runs beside each other, seeds taken together, with intervals and a test."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from job.command import guarded
from job.comparison.compared import Comparison, compare, only_where
from job.comparison.kept import KEPT, read_kept, write_kept
from job.comparison.runs import find_runs
from job.comparison.text import as_text
from job.errors import UsageError, UserError
from job.files import write_json


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.compare",
        description="What differs between runs and what came of it, finished or not, from whatever launcher. Means "
        "over seeds have BCa bootstrap intervals; settings are compared seed by seed, and tested by flipping signs.",
    )
    p.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run directories, the directory of a sweep, or a file that --keep wrote",
    )
    p.add_argument(
        "--where", nargs="+", default=[], metavar="KEY=VALUE", help="compare only the runs of which this is so"
    )
    p.add_argument("--by", metavar="KEY", help="key to order settings by (the one that differs)")
    p.add_argument("--metric", nargs="+", default=[], help="keys of evaluation.jsonl or training_log.jsonl")
    p.add_argument("--baseline", metavar="KEY=VALUE", help="setting that others are compared with (the first)")
    p.add_argument("--step", type=int, help="figures of this step (of each run's last evaluation)")
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots against the swept value")
    p.add_argument("--keep", type=Path, metavar="FILE", help="write the runs' settings and evaluations, a line a run")
    p.add_argument("--json", metavar="FILE", help="write all of it as JSON; - prints it instead of the table")
    return p


def of_paths(options: argparse.Namespace) -> Comparison:
    """The comparison that the command line asks for. UserError for fewer than two runs."""
    kept = [path for path in options.paths if path.is_file() or (path.suffix == KEPT and not path.is_dir())]
    runs, problems = find_runs(path for path in options.paths if path not in kept)
    for problem in problems:
        print(problem, file=sys.stderr)
    known = {run.path.resolve() for run in runs}
    runs += [run for path in kept for run in read_kept(path) if run.path.resolve() not in known]
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run found in {', '.join(map(str, options.paths))}; a comparison needs two")
    chosen = only_where(runs, options.where)
    if len(chosen) < 2:
        raise UsageError(
            f"--where {' '.join(options.where)}: 1 of {len(runs)} runs is left, {chosen[0].path}; a comparison needs "
            "two, so nothing is shown; `cyclevae report` shows one"
        )
    return compare(chosen, options.by, options.metric, options.baseline, options.step)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    for name in ("html", "json", "keep"):
        given = getattr(options, name)
        if given and Path(given).is_dir():
            raise UsageError(f"--{name} {given}: is a directory; give a file to write")
    comparison = of_paths(options)
    if options.json == "-":
        print(json.dumps(comparison.to_values(), indent=1))
    else:
        print(as_text(comparison))
        if options.json:
            write_json(Path(options.json), comparison.to_values(), indent=1)
    if options.keep:
        write_kept(options.keep, comparison.runs)
    if options.html:
        from job.comparison.page import write_comparison  # a second to load

        size = write_comparison(options.html, comparison)
        print(f"{options.html} ({size / 1e6:.1f} MB)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(guarded(main))
