"""What a run has done and where its time went, over all its starts: goodput.json in the run directory.

Goodput is the share of a run's time that brought it forward. A run that is killed goes on from its last checkpoint
and does the steps since then again. Done again, they come out the same, bit for bit, so they cost time and bring
nothing: they are `replayed`. What tells them apart is `furthest`, the most steps that were ever done in any start of
the run; only steps beyond it are `productive`.

A start that was killed or hung cannot count its own end. The next one does it: `counted_until` is the moment up to
which all time is accounted for, and what lies between then and now becomes `lost`, `hung`, `queued` and `starting`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from job.files import write_json
from job.metric_names import PHASES, Series
from job.monitoring.flops import Done

WRITE_SECONDS = 10.0  # between two writes of goodput.json, which a kill may set back by as much


@dataclass(frozen=True)
class Times:
    """What is known of a start's beginning, in seconds since 1970."""

    process_started: float
    launched: float | None = None  # when the launcher began with this start, before its processes were there
    last_end: float | None = None  # when the processes of the start before had ended


@dataclass
class Goodput:
    """Totals of a run over all its starts. Steps, tokens, samples and operations include replayed ones."""

    starts: int = 0
    furthest: int = 0
    steps: int = 0
    replayed_steps: int = 0
    tokens: int = 0
    samples: int = 0
    texts_alone: int = 0  # of the samples, those without a latent
    latents_alone: int = 0  # those without a text
    flops: float = 0.0
    counted_until: float = 0.0  # seconds since 1970; 0: nothing is missing, as before the first start
    longest_interval: float = 0.0  # seconds between two counts in the last start
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @classmethod
    def of(cls, path: Path) -> Goodput:
        """The totals in a file; new ones where there is none or it is damaged, since no run depends on them."""
        try:
            totals = cls(**json.loads(path.read_text()))
            totals.seconds = dict.fromkeys(PHASES, 0.0) | totals.seconds  # an earlier version had fewer phases
            return totals
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    def begin(self, times: Times, now: float) -> None:
        """Another start has come to its first step: account for the time since the last count."""
        self.starts += 1
        launched = min(times.process_started, times.launched or times.process_started)
        if self.counted_until:
            launched = max(launched, self.counted_until)
            ended = min(launched, max(self.counted_until, times.last_end or 0.0))
            uncounted = ended - self.counted_until
            lost = min(uncounted, WRITE_SECONDS + 2 * self.longest_interval)
            self.seconds["lost"] += lost
            self.seconds["hung"] += uncounted - lost
            self.seconds["queued"] += launched - ended
        self.seconds["starting"] += now - launched
        self.counted_until, self.longest_interval = now, 0.0

    def count_until(self, now: float) -> None:
        """All time until now is accounted for."""
        self.longest_interval = max(self.longest_interval, now - self.counted_until)
        self.counted_until = now

    def add_interval(self, start: int, done: int, work: Done, seconds: Mapping[str, float]) -> None:
        """Steps `start` to `done` were done, with so much work and so many seconds of the loop's phases.

        An interval may begin with replayed steps and end with new ones. The time of its steps is shared out by their
        number, since single steps are not timed here.
        """
        replayed = max(0, min(done, self.furthest) - start)
        self.furthest = max(self.furthest, done)
        self.steps += done - start
        self.replayed_steps += replayed
        self.tokens += work.tokens
        self.samples += work.samples
        self.texts_alone += work.texts_alone
        self.latents_alone += work.latents_alone
        self.flops += work.flops

        replayed_share = replayed / max(1, done - start)
        self.seconds["productive"] += (1 - replayed_share) * seconds["step"]
        self.seconds["replayed"] += replayed_share * seconds["step"]
        self.seconds["waiting_for_data"] += seconds["data_wait"]
        self.seconds["checkpointing"] += seconds["checkpoint"]
        self.seconds["evaluating"] += seconds["evaluate"]

    def series(self) -> dict[Series, float]:
        """The counters for Prometheus."""
        return {
            ("cyclevae_steps_total", ()): self.steps,
            ("cyclevae_replayed_steps_total", ()): self.replayed_steps,
            ("cyclevae_tokens_total", ()): self.tokens,
            ("cyclevae_samples_total", ()): self.samples,
            ("cyclevae_unpaired_samples_total", ("text",)): self.texts_alone,
            ("cyclevae_unpaired_samples_total", ("latent",)): self.latents_alone,
            ("cyclevae_model_flops_total", ()): self.flops,
            ("cyclevae_restarts_total", ()): max(0, self.starts - 1),
            **{("cyclevae_goodput_seconds_total", (phase,)): seconds for phase, seconds in self.seconds.items()},
        }
