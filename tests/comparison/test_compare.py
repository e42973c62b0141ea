"""`cyclevae compare`: runs found, grouped, paired, and told of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_directories import run_directory, sweep

from job.command import guarded
from job.compare import main
from job.comparison.runs import find_runs
from job.comparison.sweep import show_sweep
from job.errors import UserError
from job.files import write_json

SEEDS = range(1, 8)
FIGURES = {
    **{(0.05, seed): 0.50 + 0.01 * seed for seed in SEEDS},
    **{(0.1, seed): 0.52 + 0.01 * seed + 0.001 * (seed % 3) for seed in SEEDS},
    **{(0.2, seed): 0.60 + 0.01 * seed for seed in (1, 2, 3)},
}
METRIC = "t2l2t/token_acc"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("runs") / "sweep", FIGURES)


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    main([*arguments, "--json", "-"])
    return json.loads(capsys.readouterr().out)


def test_seeds_are_grouped_and_paired(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, str(swept))
    assert found["keys"] == ["loss.cycle_text_weight"]
    assert found["by"] == "loss.cycle_text_weight"
    first, second, third = found["metrics"][METRIC]
    assert first["estimate"]["mean"] == pytest.approx(0.54)
    assert first["estimate"]["low"] < 0.54 < first["estimate"]["high"]
    assert first["difference"] is None
    # Seeds move both settings alike: in pairs the difference is known far better than either mean.
    assert second["difference"]["p"] == 2 / 2**7
    assert second["difference"]["estimate"]["count"] == 7
    width = second["difference"]["estimate"]["high"] - second["difference"]["estimate"]["low"]
    assert width < 0.1 * (second["estimate"]["high"] - second["estimate"]["low"])
    assert third["difference"]["p"] is None
    assert third["difference"]["estimate"]["mean"] == pytest.approx(0.1)
    assert third["difference"]["estimate"]["count"] == 3


def test_the_table(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(swept)])
    told = capsys.readouterr().out
    assert told.startswith("17 runs, 3 settings, 7 seeds; they differ in loss.cycle_text_weight\n")
    assert "too few seeds (3 of the 6 needed)" in told
    assert f"{METRIC}: share of tokens right" in told
    row = next(line for line in told.splitlines() if line.lstrip().startswith("loss.cycle_text_weight=0.1 "))
    assert row.split()[-1] == "0.016"
    assert "95% intervals of 3 seeds are too narrow" in told


def test_a_baseline_a_step_and_metrics_are_chosen(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choice = ["--baseline", "loss.cycle_text_weight=0.2", "--step", "50", "--metric", METRIC, "loss"]
    found = compared(capsys, str(swept), *choice)
    assert list(found["metrics"]) == [METRIC, "loss"]
    first = found["metrics"][METRIC][0]
    assert first["estimate"]["mean"] == pytest.approx(0.27)
    assert first["difference"]["estimate"]["mean"] == pytest.approx(-0.05)
    assert found["metrics"]["loss"][0]["estimate"]["mean"] == 2.0


def test_runs_that_are_not_finished_are_compared_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a SLURM sweep's directories; the third run has only begun, the fourth waits for a node."""
    at = {50: {METRIC: 0.1}, 100: {METRIC: 0.2}}
    keys = "optimizer.lr=0.1", "optimizer.lr=0.2", "optimizer.lr=0.3"
    run_directory(tmp_path / "a", keys[0], evaluations=at)
    run_directory(tmp_path / "b", keys[1], evaluations={50: {METRIC: 0.3}}, finished=False)
    run_directory(tmp_path / "c", keys[2], evaluations={}, finished=False)
    write_json(tmp_path / "a" / "slurm" / "submission.json", {})
    write_json(tmp_path / "d" / "slurm" / "submission.json", {})
    write_json(tmp_path / ".submitit" / "config.yaml", {})
    main([str(tmp_path)])
    told = capsys.readouterr().out
    assert told.startswith("3 runs, 3 settings")
    assert "note: not finished: b (step 50 of 100), c (step 50 of 100)" in told
    assert "note: without an evaluation yet, so without figures of one: c" in told
    assert "note: the figures are of different steps (50 to 100): --step 50 compares them at one" in told
    assert "fewer than 3 seeds" in told
    found = compared(capsys, str(tmp_path), "--step", "50")
    assert [line["by_seed"] for line in found["metrics"][METRIC]] == [{"42": 0.1}, {"42": 0.3}, {}]
    main([str(tmp_path), "--step", "50", "--by", "optimizer.lr"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[-1:] == ["a"]]
    assert ["0.1", "42", "50"] in [row[:3] for row in rows]


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 0.1), ("b", 0.3)):
        run_directory(tmp_path / name, f"logging.run_name={name}", evaluations={100: {METRIC: value}})
    found = compared(capsys, str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a"))
    assert len(found["runs"]) == 2
    assert found["metrics"][METRIC][0]["by_seed"] == {"42": pytest.approx(0.2)}
    assert any("seed 42 was run 2 times" in note for note in found["notes"])


def test_a_damaged_run_is_named_and_left_out(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = run_directory(tmp_path / "broken", evaluations={})
    (broken / "config.yaml").write_text("data: [")
    main([str(swept), str(broken)])
    assert f"left out: {broken / 'config.yaml'}: damaged" in capsys.readouterr().err
    assert len(find_runs([swept, broken])[0]) == len(FIGURES)


def test_runs_are_kept_in_a_file_and_compared_without_their_directories(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.jsonl"
    before = compared(capsys, str(swept), "--keep", str(kept))
    for here, there in zip(compared(capsys, str(kept))["metrics"][METRIC], before["metrics"][METRIC], strict=True):
        assert here["by_seed"] == pytest.approx(there["by_seed"], rel=1e-5)
        assert here["setting"] == there["setting"]
    assert compared(capsys, str(kept), str(swept)) == before, "no run counts twice"
    monkeypatch.setattr("job.comparison.kept.defaults", lambda: {"loss.cycle_text_weight": 0.05, "optimizer.lr": 7.0})
    labels = [figures["setting"] for figures in compared(capsys, str(kept))["metrics"][METRIC]]
    assert labels == [figures["setting"] for figures in before["metrics"][METRIC]], "the defaults of then still hold"
    kept.write_text('{"run": "x"}\n')
    with pytest.raises(UserError, match="not written by --keep"):
        main([str(kept)])


def test_a_file_of_runs_may_have_any_name(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.txt"
    before = compared(capsys, str(swept), "--keep", str(kept))
    assert len(compared(capsys, str(kept))["runs"]) == len(before["runs"])


def test_a_part_of_the_runs_is_compared(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, str(swept), "--where", "loss.cycle_text_weight=0.2")
    assert [len(figures["by_seed"]) for figures in found["metrics"][METRIC]] == [3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--where", "loss.cycle_text_weight"], "give KEY=VALUE"),
        (["--where", "loss.cycle_weight=1"], "did you mean"),
        (["--where", "loss.cycle_text_weight=3"], "no run has it; they have loss.cycle_text_weight=0.05, 0.1, 0.2"),
        (
            ["--where", "loss.cycle_text_weight=0.1", "training.seed=3"],
            "--where loss.cycle_text_weight=0.1 training.seed=3: 1 of 17 runs is left, ",
        ),
        (["--by", "optimizer.lr"], "--by optimizer.lr: it is the same in all runs"),
        (["--by", "training.seed"], "runs that differ in their seed are taken together"),
        (["--by", "optimizer.rl"], "did you mean optimizer.lr"),
        (["--metric", "t2l2t/token_ac"], "did you mean t2l2t/token_acc"),
        (["--step", "7"], "--step 7: no run was evaluated at it; they were at 100"),
        (["--baseline", "lr=1"], "give one of the settings: loss.cycle_text_weight=0.05"),
    ],
)
def test_what_the_runs_do_not_have_is_one_line(
    swept: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: main([str(swept), *arguments])) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert len(told.err.splitlines()) == 1


def test_paths_without_runs_are_refused(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in ((tmp_path, "no run in it"), (tmp_path / "x", "no such directory")):
        assert guarded(lambda path=path: main([str(path)])) == 1  # type: ignore[misc]
        assert words in capsys.readouterr().err
    assert guarded(lambda: main([str(next(swept.iterdir()))])) == 1
    assert "a comparison needs two" in capsys.readouterr().err


def test_a_sweep_ends_with_the_comparison(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_sweep([*sorted(swept.iterdir()), tmp_path / "never started"])
    told = capsys.readouterr().out
    assert "17 runs, 3 settings, 7 seeds" in told
    assert "left out: " in told
    show_sweep([next(swept.iterdir())])
    assert capsys.readouterr().out == ""


def test_it_imports_no_torch(swept: Path) -> None:
    code = f"import sys; from job.compare import main; main([{str(swept)!r}]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
