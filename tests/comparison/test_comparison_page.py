"""The page of a comparison holds what the table holds, and a browser draws it."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import opened
from run_directories import run_directory, sweep

from job.command import guarded
from job.compare import main
from job.comparison.compared import compare
from job.comparison.page import metric_plot, write_comparison
from job.comparison.runs import find_runs

METRIC = "t2l2t/token_acc"
FIGURES = {(weight, seed): weight + 0.01 * seed for weight in (0.1, 0.2) for seed in (1, 2, 3)}


def test_a_plot_has_means_intervals_and_seeds(tmp_path: Path) -> None:
    found = compare(find_runs([sweep(tmp_path / "sweep", FIGURES)])[0])
    mean, seeds = metric_plot(found, METRIC).traces
    assert mean["x"] == [0.1, 0.2]
    assert mean["y"] == pytest.approx([0.12, 0.22])
    estimate = found.metrics[METRIC][1].estimate
    assert estimate is not None
    assert estimate.high is not None
    assert mean["error_y"]["array"][1] == estimate.high - estimate.mean > 0
    assert sorted(seeds["y"]) == pytest.approx(sorted(FIGURES.values()))
    assert seeds["x"] == [0.1] * 3 + [0.2] * 3


def test_further_keys_make_further_lines(tmp_path: Path) -> None:
    for name, keys in {"a": ("1", "0.1"), "b": ("1", "0.2"), "c": ("2", "0.1")}.items():
        overrides = [f"model.n_blocks={keys[0]}", f"loss.cycle_text_weight={keys[1]}"]
        run_directory(tmp_path / name, *overrides, evaluations={100: {METRIC: 0.5}})
    runs = find_runs([tmp_path])[0]
    plot = metric_plot(compare(runs, by="loss.cycle_text_weight"), METRIC)
    lines = [trace for trace in plot.traces if "error_y" in trace]
    assert {trace["name"]: trace["x"] for trace in lines} == {"model.n_blocks=1": [0.1, 0.2], "model.n_blocks=2": [0.1]}
    (settings, _) = metric_plot(compare(runs), METRIC).traces  # nothing to order them by
    assert settings["x"][0] == "model.n_blocks=1 loss.cycle_text_weight=0.1"


def test_a_directory_in_the_place_of_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: main([str(tmp_path), "--html", str(tmp_path)])) == 2
    assert "is a directory; give a file to write" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_it(width: int, scheme: str, tmp_path: Path) -> None:
    path = tmp_path / "c.html"
    write_comparison(path, compare(find_runs([sweep(tmp_path / "sweep", FIGURES)])[0]))
    with opened(path, width, scheme, touch=width < 500) as there:
        assert there.evaluate("document.querySelectorAll('.plot').length") == 1
        assert there.evaluate("document.querySelectorAll('.errorbar').length") == 2
        assert there.evaluate("document.documentElement.scrollWidth") <= width
        assert (there.console, there.requests) == ([], [])
