"""What a run has done and where its time went, over all its starts: goodput.json in the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from job.files import write_json
from job.monitoring.flops import Done
from job.monitoring.metrics import PHASES, Series


@dataclass
class Goodput:
    """Totals of a run. `furthest` is the most steps that were ever done: what is done again below it is replayed."""

    starts: int = 0
    furthest: int = 0
    steps: int = 0
    replayed_steps: int = 0
    tokens: int = 0
    samples: int = 0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @classmethod
    def of(cls, path: Path) -> Goodput:
        """The totals in a file; new ones where there is none or a disk damaged it: they are for people, no run depends on them."""
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    def steps_done(self, start: int, done: int, work: Done) -> None:
        """Steps `start` to `done` were done; call before `time_spent`, which moves `furthest` on."""
        self.steps += done - start
        self.replayed_steps += max(0, min(done, self.furthest) - start)
        self.tokens, self.samples, self.flops = (
            self.tokens + work.tokens,
            self.samples + work.samples,
            self.flops + work.flops,
        )

    def time_spent(self, start: int, done: int, seconds: Mapping[str, float]) -> None:
        """Seconds of the loop's phases while steps `start` to `done` were done."""
        replayed = max(0, min(done, self.furthest) - start) / max(1, done - start)
        self.seconds["productive"] += (1 - replayed) * seconds["step"]
        self.seconds["replayed"] += replayed * seconds["step"]
        self.seconds["waiting_for_data"] += seconds["data_wait"]
        self.seconds["checkpointing"] += seconds["checkpoint"]
        self.seconds["evaluating"] += seconds["evaluate"]
        self.furthest = max(self.furthest, done)

    def series(self) -> dict[Series, float]:
        """The counters for Prometheus."""
        return {
            ("cyclevae_steps_total", ()): self.steps,
            ("cyclevae_replayed_steps_total", ()): self.replayed_steps,
            ("cyclevae_tokens_total", ()): self.tokens,
            ("cyclevae_samples_total", ()): self.samples,
            ("cyclevae_model_flops_total", ()): self.flops,
            ("cyclevae_restarts_total", ()): max(0, self.starts - 1),
            **{("cyclevae_goodput_seconds_total", (phase,)): seconds for phase, seconds in self.seconds.items()},
        }
