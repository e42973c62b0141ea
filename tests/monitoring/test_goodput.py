"""What a run has done and where its time went goes on over its restarts."""

from __future__ import annotations

from pathlib import Path

from job.monitoring.flops import Done
from job.monitoring.goodput import Goodput, Times


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


NOTHING = {"step": 0.0, "data_wait": 0.0, "checkpoint": 0.0, "evaluate": 0.0}


def after_a_start_and(times: Times) -> dict[str, float]:
    """A start that counts every five seconds until second 200, and another whose first step begins in second 1000."""
    goodput = Goodput()
    goodput.begin(Times(110.0, launched=100.0), now=120.0)
    assert goodput.seconds["starting"] == 20
    for now in range(125, 205, 5):
        goodput.add_interval(0, 0, Done(0, 0, 0.0), NOTHING)
        goodput.count_until(now)
    goodput.begin(times, now=1000.0)
    goodput.seconds["starting"] -= 20
    assert sum(goodput.seconds.values()) == 800, "no second is lost or counted twice"
    return {phase: seconds for phase, seconds in goodput.seconds.items() if seconds}


def test_the_time_between_two_starts_is_accounted_for() -> None:
    """A kill costs what was not counted yet; what is longer than that was a hang, and the rest waited for a place."""
    killed = Times(990.0, launched=980.0, last_end=212.0)
    assert after_a_start_and(killed) == {"lost": 12, "queued": 768, "starting": 20}
    hung = Times(990.0, launched=980.0, last_end=820.0)
    assert after_a_start_and(hung) == {"lost": 20, "hung": 600, "queued": 160, "starting": 20}
    by_hand = Times(990.0)  # nobody saw it end
    assert after_a_start_and(by_hand) == {"queued": 790, "starting": 10}
    with_clocks_apart = Times(990.0, launched=195.0, last_end=190.0)
    assert after_a_start_and(with_clocks_apart) == {"starting": 800}


def test_totals_of_an_earlier_version_go_on(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    path.write_text('{"starts": 2, "seconds": {"productive": 5.0}}')
    goodput = Goodput.of(path)
    goodput.begin(Times(1.0), now=2.0)
    assert (goodput.starts, goodput.seconds["productive"], goodput.seconds["hung"]) == (3, 5, 0)
