"""The table of `list` and `status`."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from job.launch.run_status import RunStatus, show

ROW = RunStatus(
    run="/runs/r",
    job="r",
    state="RUNNING",
    alive=True,
    step=1,
    steps=2,
    loss=1.5,
    tokens_per_second=9.0,
    seconds_left=61,
    restarts=None,
    reason="why",
    log="where",
)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    show([ROW], as_json=False)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "r    RUNNING  yes    1/2   1.5   9/s   0:01:01  -         /runs/r",
        "    why",
    ]


def test_what_programs_read(capsys: pytest.CaptureFixture[str]) -> None:
    show([ROW], as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row == asdict(ROW)
    assert list(row) == [
        "run",
        "job",
        "state",
        "alive",
        "step",
        "steps",
        "loss",
        "tokens_per_second",
        "seconds_left",
        "restarts",
        "reason",
        "log",
        "results",
        "node_hours",
        "lost_ranks",
        "excluded_nodes",
    ]
