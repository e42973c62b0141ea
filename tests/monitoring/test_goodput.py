"""What a run has done and where its time went goes on over its restarts."""

from __future__ import annotations

from pathlib import Path

from job.monitoring.flops import Done
from job.monitoring.goodput import Goodput


def test_goodput_tells_replayed_steps_from_new_ones(tmp_path: Path) -> None:
    path, seconds = tmp_path / "goodput.json", {"step": 10.0, "data_wait": 1.0, "checkpoint": 2.0, "evaluate": 3.0}
    before = Goodput.of(path)
    before.add_interval(0, 10, Done(100, 20, 1e9), seconds)
    before.write(path)
    after = Goodput.of(path)  # killed at step 10, goes on from the checkpoint of step 4
    for start, done in ((4, 8), (8, 12)):
        after.add_interval(start, done, Done(40, 8, 4e8), seconds)
    assert (after.steps, after.replayed_steps, after.tokens, after.samples, after.furthest) == (18, 6, 180, 36, 12)
    assert after.seconds["replayed"] == 10 + 5
    assert after.seconds["productive"] == 10 + 5
    assert (after.seconds["waiting_for_data"], after.seconds["checkpointing"], after.seconds["evaluating"]) == (3, 6, 9)
    path.write_text('{"steps": 18, "rep')
    assert Goodput.of(path) == Goodput()
