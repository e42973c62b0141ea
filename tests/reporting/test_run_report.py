"""The report of a run shows what its files hold, whether it is finished or not, and never fails a run."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import opened
from tiny_run import configured, tiny_run

from job import report
from job.command import guarded
from job.errors import ExitCode, UserError
from job.files import json_lines
from job.metric_names import EVALUATION, PHASES
from job.pages.page import compressed_plotly
from job.reporting.end_of_run import at_the_end
from job.train import train

OVERRIDES = ["logging.num_samples=3", "logging.sample_freq=2", "logging.eval_freq=4", "logging.log_freq=1"]


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "finished", prepared, *OVERRIDES)


def traces(page: Path) -> dict[str, dict[str, Any]]:
    """Every line that the page draws, by its name."""
    found = re.search(r'id="plots">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    plots = json.loads(found.group(1))
    return {trace.get("name", ""): trace for plot in plots for trace in plot["traces"]}


def test_a_finished_run_has_one_with_all_it_logged(finished: Path) -> None:
    page, drawn = (finished / "report.html").read_text(), traces(finished / "report.html")
    assert "finished: 6 steps" in page
    training, evaluations = json_lines(finished / "training_log.jsonl"), json_lines(finished / "evaluation.jsonl")
    line = drawn["training (base_l2t_text_loss)"]
    assert line["x"] == [1, 2, 3, 4, 5, 6]
    assert line["y"] == pytest.approx([entry["base_l2t_text_loss"] for entry in training], rel=1e-5)
    assert drawn["held out (l2t/ce)"]["y"] == pytest.approx([entry["l2t/ce"] for entry in evaluations], rel=1e-5)
    for metric in EVALUATION:
        held_out = metric.key in drawn or f"held out ({metric.key})" in drawn
        assert held_out == (metric.key in evaluations[-1]), metric.key
    samples = json_lines(finished / "samples.jsonl")
    assert page.count("<summary>") == 3 + 3  # texts; the command, the last evaluation, and keys at their default
    assert all(sample["text"] in page for sample in samples[0]["samples"])
    assert all(phase.replace("_", " ") in page for phase in PHASES)
    assert len(drawn["true"]["x"]) == len(drawn["predicted"]["x"]) > 100
    assert re.search(r"<td>model.hidden_size</td><td>32</td><td>512</td>", page)


def test_time_and_steps_are_those_of_the_whole_run(finished: Path) -> None:
    """Written before the run's very end, but after all of its steps."""
    page = (finished / "report.html").read_text()
    assert "0 of 6 steps were done again" in page
    assert "96 samples" in page


def test_the_command_makes_the_same_of_a_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main([str(finished), "--out", str(tmp_path / "r.html")])
    out = capsys.readouterr().out
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'r.html'))} \(\d\.\d MB\)\n", out)
    own, again = traces(finished / "report.html"), traces(tmp_path / "r.html")
    assert own["predicted"]["y"] == pytest.approx(again["predicted"]["y"], rel=1e-3, abs=1e-4)
    assert own.keys() == again.keys()


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("report.html", "result.json", "checkpoints"))
    return to


def test_a_run_that_was_stopped_early(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(finished, tmp_path / "stopped")
    lines = (run / "training_log.jsonl").read_text().splitlines()
    (run / "training_log.jsonl").write_text("\n".join([*lines[:3], lines[3][:20]]))
    for name in ("evaluation.jsonl", "samples.jsonl", "goodput.json", "environment.json"):
        (run / name).unlink()
    report.main([str(run)])
    page = (run / "report.html").read_text()
    assert "not finished: 3 of 6 steps" in page
    assert "No evaluation yet; the first one comes after 4 steps" in page
    assert "no checkpoint in this run yet" in page
    assert "no checkpoint in this run yet" in capsys.readouterr().err


def test_a_run_that_has_just_begun(tmp_path: Path, finished: Path) -> None:
    run = tmp_path / "begun"
    run.mkdir()
    shutil.copy(finished / "config.yaml", run)
    report.main([str(run), "--no-model"])
    assert "nothing logged yet" in (run / "report.html").read_text()


def test_texts_of_a_run_are_shown_and_not_obeyed(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "<b>name")
    evil = "<script>alert(1)</script>"
    sample = {"text": evil, "l2t": None, "t2l2t": f"{evil} &amp;"}
    (run / "samples.jsonl").write_text(json.dumps({"step": 2, "samples": [sample]}) + "\n")
    report.main([str(run), "--no-model"])
    page = (run / "report.html").read_text()
    assert evil not in page
    assert "<b>name" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; <mark>&amp;amp;</mark>" in page


def test_passes_are_drawn_once_they_were_measured(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    report.main([str(run), "--no-model"])
    assert "needs loss.text_t_mode=random" in (run / "report.html").read_text()
    config = (run / "config.yaml").read_text().replace("text_t_mode: full", "text_t_mode: random")
    (run / "config.yaml").write_text(config)
    report.main([str(run), "--no-model"])
    command = f"python -m job.evaluate {run} --passes 1 2 4 8 16 --json &gt; {run}/passes.jsonl"
    assert command in (run / "report.html").read_text()
    lines = [{"passes": n, "t2l2t/exact_match": n / 10, "t2l2t/chrf": 50.0 + n} for n in (4, 1)]
    (run / "passes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.main([str(run), "--no-model"])
    drawn = traces(run / "report.html")
    assert (drawn["t2l2t/chrf"]["x"], drawn["t2l2t/chrf"]["y"]) in [([1, 4], [51.0, 54.0])]


@pytest.mark.parametrize("name", ["nothing", "config.yaml"])
def test_what_is_no_run_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "config.yaml":
        (tmp_path / name).write_text("data: [1")
    assert guarded(lambda: report.main([str(tmp_path)])) == ExitCode.FAILED
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "config.yaml" in said[0]


def test_a_report_that_cannot_be_written_fails_no_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_arguments: object, **_keywords: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("job.reporting.end_of_run.measure", broken)  # the latents
    (tmp_path / "run" / "report.html" / "x").mkdir(parents=True)
    assert (
        train(configured(f"data.dir={prepared}", "training.num_train_steps=2"), tmp_path / "run") == ExitCode.FINISHED
    )
    assert (tmp_path / "run" / "result.json").exists()
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith("warning: no report (IsADirectoryError")]
    assert "report:" not in printed.out
    shutil.rmtree(tmp_path / "run" / "report.html")
    assert at_the_end(tmp_path / "run", broken) is not None  # type: ignore[arg-type]
    assert "Not shown: RuntimeError: out of" in (tmp_path / "run" / "report.html").read_text()


def test_without_plotly_there_is_one_line(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    compressed_plotly.cache_clear()
    with pytest.raises(UserError, match="pip install plotly"):
        report.main([str(finished), "--no-model"])


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_it(width: int, scheme: str, finished: Path) -> None:
    with opened(finished / "report.html", width, scheme, touch=width < 500) as there:
        plots = there.evaluate("document.querySelectorAll('.plot').length")
        assert there.evaluate("document.querySelectorAll('.plot .main-svg').length") >= plots > 10
        assert there.evaluate("document.documentElement.scrollWidth") <= width
        assert (there.console, there.requests) == ([], [])
