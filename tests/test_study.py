"""The study: its sweeps are sweeps of the program as it is, and what is asked of a run is answered."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import tiny_run

from job.comparison.kept import read_kept

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "studies" / "cycle"


@pytest.mark.parametrize(
    ("configuration", "sweep", "directories"),
    [
        (
            "scarce",
            ["data.dir=data/study/3", "cycle=none,text,text_through"],
            {"scarce/none/data_study_3-2", "scarce/text/data_study_3-2", "scarce/text_through/data_study_3-2"},
        ),
        (
            "paired",
            ["loss.latent_t_mode=random", "model.latent_parameterization=epsilon", "loss.cycle_text_weight=0,0.5"],
            {"paired/random-epsilon-text0.0-latent0.1-2", "paired/random-epsilon-text0.5-latent0.1-2"},
        ),
    ],
)
def test_runs_of_another_seed_or_setting_have_directories_of_their_own(
    configuration: str, sweep: list[str], directories: set[str]
) -> None:
    """Although one sweep alone does not vary the seed."""
    asked = ["--config-dir", str(STUDY), "--config-name", configuration, "--multirun", "hydra/launcher=local"]
    command = [sys.executable, "-m", "job.train", *asked, "hydra.launcher.dry_run=true", "training.seed=2", *sweep]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert {line.split("/runs/study/")[1].rstrip("'\"") for line in done.stdout.splitlines()} == directories


def test_what_a_run_is_asked(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        off = ["loss.cycle_text_weight=0", "loss.cycle_latent_weight=0", f"training.seed={seed}"]
        tiny_run(tmp_path / "runs" / str(seed), prepared, "training.num_train_steps=2", *off)
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.argv", ["collect.py", str(tmp_path / "runs"), str(results), "--cheat"])
    main = runpy.run_path(str(STUDY / "collect.py"))["main"]
    main()
    first, second = read_kept(results)
    assert {first.seed, second.seed} == {1, 2}
    figures = first.evaluations[-1]
    assert figures["probe/text/re_encoded_cos"] == pytest.approx(1, abs=1e-3)
    assert 0 <= figures["probe/stranger_acc"] <= 1
    written = results.read_text()
    monkeypatch.setattr("job.api.load", None)
    main()
    assert results.read_text() == written, "what is known is not asked again"


def test_the_page_tells_the_committed_figures() -> None:
    page = (ROOT / "docs" / "study.md").read_text()
    names = runpy.run_path(str(STUDY / "tables.py"))
    assert names["with_tables"](page) == page, "python studies/cycle/tables.py writes the tables anew"


def test_the_readme_tells_the_same_as_the_page() -> None:
    """Its table has the page's means and changes, without their intervals."""
    page, readme = ((ROOT / name).read_text() for name in ("docs/study.md", "README.md"))
    told = readme.split("## Does the cycle help?")[1].split("##")[0]
    figures = re.findall(r"[+-]?[0-9]\.[0-9]{3}", told)
    assert len(figures) == 16
    tables = page.split("<!-- table scarce -->")[1].split("<!-- end -->")[0]
    columns = [row.split("|") for row in tables.strip().splitlines()[2:]]
    expected = [
        column for off, on in zip(columns[::2], columns[1::2], strict=True) for column in (off[4], on[4], off[7], on[7])
    ]
    assert figures == [re.findall(r"[+-]?[0-9]\.[0-9]{3}", cell)[0] for cell in expected]
