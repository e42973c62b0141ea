"""What every step trains: a function of the configuration and the step alone, and so the same on every rank."""

from __future__ import annotations

import random
from dataclasses import dataclass

from job.config import MODES, LossConfig, TrainingConfig
from job.objective.losses import ramp
from job.objective.noise import seed_for
from job.row_kinds import LATENT, PAIRED, TEXT


@dataclass(frozen=True)
class Plan:
    """The plan that a configuration makes for the steps of a run."""

    loss: LossConfig
    training: TrainingConfig

    def mode(self, step: int) -> str:
        """What 0-based `step` trains: cycle_vae, unconditional, l2t or t2l; the same on every rank."""
        if self.loss.loss_type == "random":
            draw = random.Random(seed_for("mode", self.training.seed, step))
            return draw.choices(MODES, weights=self.training.mode_weights)[0]
        if self.loss.loss_type == "sequential":
            schedule = self.training.sequential_schedule
            place = step % sum(item.steps for item in schedule)
            for item in schedule:
                if place < item.steps:
                    return item.type
                place -= item.steps
        return self.loss.loss_type

    def cycle_weights(self, step: int) -> tuple[float, float]:
        """Weights of cycle_text and cycle_latent as applied at a step."""
        c = self.loss
        return (
            ramp(step, c.cycle_text_weight, c.cycle_text_warmup_steps, c.cycle_text_ramp_steps),
            ramp(step, c.cycle_latent_weight, c.cycle_latent_warmup_steps, c.cycle_latent_ramp_steps),
        )

    def passes(self, step: int, kind: int = PAIRED) -> dict[str, float]:
        """Passes of a row of a kind through the model at a step: t2l and l2t read one head, joint reads both.

        A pass is forward and backward; one without gradient counts a third.
        """
        mode = self.mode(step)
        if mode != "cycle_vae":
            return {"joint" if mode == "unconditional" else mode: 1.0} if kind == PAIRED else {}
        cycle_text, cycle_latent = (weight > 0 for weight in self.cycle_weights(step))
        if kind == TEXT:
            predicted = 1 / 3 if self.loss.cycle_stop_grad_latent else 1.0
            return {"t2l": predicted, "l2t": 1.0} if cycle_text else {}
        if kind == LATENT:
            return {"t2l": 1.0, "l2t": 1 / 3} if cycle_latent else {}
        cycle_text = cycle_text and self.loss.cycle_text_on != "unpaired"
        decodes_anew = cycle_latent and self.loss.text_t_mode == "random" and self.loss.text_full_share < 1
        return {"t2l": 1.0 + cycle_latent, "l2t": 1.0 + cycle_text + decodes_anew / 3}
