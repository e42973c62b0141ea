"""curves.png shows every metric that the logs hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from job import curves
from job.errors import UserError
from job.metric_names import EVALUATION, LOSS_TERMS
from job.monitoring.curves import curve_panels, write_curves

TRAIN = {
    "loss": 1.0,
    "base_l2t_text_loss": 2.0,
    "base_t2l_latent_loss": 0.5,
    "cycle_text_weight": 0.0,
    "grad_norm": 1.0,
    "tokens_per_second": 10.0,
    "lr": 1e-3,
}


def test_lines_are_the_logged_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[float, float]]] = {}
    plot = Axes.plot

    def spy(self: Axes, x: tuple[float], y: tuple[float], **keywords: Any) -> object:
        drawn[str(keywords["label"])] = list(zip(x, y, strict=True))
        return plot(self, x, y, **keywords)

    monkeypatch.setattr(Axes, "plot", spy)
    lines = [{"step": step, **TRAIN} for step in (10, 20, 30)]
    lines[2]["cycle_text_loss"] = 7.0  # sets in late
    (tmp_path / "training_log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "lo'
    )
    evaluation = {"step": 30, "l2t/ce": 3.0, "l2t2l/cos": 0.5, "t2l/x0_cos@0.25": 0.9, "t2l/x0_cos@0.9": 0.6}
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(evaluation) + "\n")
    write_curves(tmp_path)
    assert drawn["base_l2t_text_loss"] == [(10, 2), (20, 2), (30, 2)]
    assert drawn["cycle_text_loss"] == [(30, 7)]
    assert drawn["l2t/ce"] == [(30, 3)]
    assert "t2l/x0_cos" not in drawn
    assert [key for key in drawn if key.startswith("t2l/")] == ["t2l/x0_cos@0.9", "t2l/x0_cos@0.25"]
    assert imread(tmp_path / "curves.png").shape[2] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "evaluation.jsonl", "training_log.jsonl"]


def test_no_log_gives_an_empty_figure(tmp_path: Path) -> None:
    write_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_every_loss_and_metric_of_the_evaluation_is_drawn() -> None:
    keys = {key for panel in curve_panels() for key in panel.keys}
    assert {term.key for term in LOSS_TERMS} - keys == {"loss"}  # a sum of terms whose weights change
    assert {metric.key for metric in EVALUATION} <= keys
    assert {"lr", "grad_norm", "tokens_per_second", "cycle_text_weight", "cycle_latent_weight"} <= keys


def test_panels_show_no_metric_twice() -> None:
    names = [key for panel in curve_panels() for key in panel.keys]
    assert len(names) == len(set(names))


def test_curves_of_a_run_that_has_not_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "training_log.jsonl").write_text(json.dumps({"step": 10, **TRAIN}) + '\n{"step": 2')
    curves.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    curves.main([str(tmp_path), "--out", str(tmp_path / "new" / "x.png")])
    assert (tmp_path / "new" / "x.png").read_bytes() == (tmp_path / "curves.png").read_bytes()
    with pytest.raises(UserError, match=r"training_log\.jsonl"):
        curves.main([str(tmp_path / "new")])
