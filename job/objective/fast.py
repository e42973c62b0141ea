"""The objective with half the passes: the same losses as `Trainer`, by a model's `encode` and a cross-entropy without whole logits.

T2L and L2T go through the model as one batch, and so do the two cycle passes. Where no gradient joins the two pairs, each is a stage
of its own, so that the first pair's activations are gone before the second pair's are made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from job.config import LossConfig, ModelConfig, TrainingConfig
from job.model.cross_entropy import linear_cross_entropy
from job.model.groups import Rows
from job.objective.losses import latent_loss
from job.objective.trainer import Batch, Metrics, Step, Trainer


class FastTrainer(Trainer):
    """Trainer whose model also has encode(groups, padding) -> (text head inputs, latent predictions)."""

    def __init__(
        self,
        model: nn.Module,
        model_config: ModelConfig,
        loss: LossConfig,
        training: TrainingConfig,
        mask_token_id: int,
    ) -> None:
        super().__init__(model, model_config, loss, training, mask_token_id)
        model.compiled, model.checkpointing = training.compile_model, training.activation_checkpointing  # type: ignore[assignment]

        self._carry: tuple[Step, Tensor, Metrics, Tensor, Tensor]  # from the first stage to the second

    def stages(self, step: int) -> int:
        """2 where the cycle terms can be differentiated by themselves; every parameter then has a gradient in both stages, or in neither."""
        both = self.mode(step) == "cycle_vae" and min(self.cycle_weights(step)) > 0
        return 2 if both and self.loss.cycle_stop_grad_latent else 1

    def forward(self, batch: Batch, step: int, noise: Any = None, stage: int | None = None) -> tuple[Tensor, Metrics]:
        """As `Trainer.forward`; with `stage`, the losses of one stage (their sum is the loss), the last one with all metrics."""
        if stage == 1:
            s, base, metrics, x0, tokens = self._carry
            loss, cycle = self._cycle(s, step, x0, tokens)
            return loss, {**metrics, **cycle, "loss": base + loss.detach()}
        self._last_stage = stage is None or self.stages(step) == 1
        return super().forward(batch, step, noise)

    def _cycle_vae(self, s: Step, step: int) -> tuple[Tensor, Metrics]:
        text_weight, latent_weight = self.cycle_weights(step)
        t, z_t, target = self.noisy_latent(s, "latent")
        text, prediction = self._encode(s, self._t2l_rows(s.tokens, z_t, t), self._l2t_rows(s, s.latent))
        base_latent = latent_loss(prediction, target, self.loss.normalize_latent_loss)
        base_text, tokens = self._cross_entropy(s, text, pick=latent_weight > 0)
        total = base_text + self.loss.latent_loss_weight * base_latent
        metrics: Metrics = {
            "base_l2t_text_loss": base_text,
            "base_t2l_latent_loss": base_latent,
            "cycle_text_weight": text_weight,
            "cycle_latent_weight": latent_weight,
            **self._latent_metrics(t, prediction, z_t),
        }
        x0 = self.schedule.predict_x0(z_t, t, prediction)
        if not self._last_stage:
            detached = {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}
            self._carry = s, total.detach(), detached, x0.detach(), tokens
        elif text_weight + latent_weight > 0:
            loss, cycle = self._cycle(s, step, x0, tokens)
            return total + loss, {**metrics, **cycle}
        return total, metrics

    def _cycle(self, s: Step, step: int, x0: Tensor, tokens: Tensor) -> tuple[Tensor, Metrics]:
        """The cycle terms whose weight is not zero, from the predicted latents [B, D] and the pseudo-tokens [B, S]."""
        text_weight, latent_weight = self.cycle_weights(step)
        groups, losses, metrics = [], [], {}
        if latent_weight > 0:
            t, z_t, target = self.noisy_latent(s, "cycle_latent")
            groups.append(self._t2l_rows(tokens, z_t, t))
        if text_weight > 0:
            groups.append(self._l2t_rows(s, x0.detach() if self.loss.cycle_stop_grad_latent else x0))
        text, prediction = self._encode(s, *groups)
        if text_weight > 0:
            metrics["cycle_text_loss"], _ = self._cross_entropy(s, text)
            losses.append(text_weight * metrics["cycle_text_loss"])
        if latent_weight > 0:
            metrics["cycle_latent_loss"] = latent_loss(prediction, target, self.loss.normalize_latent_loss)
            losses.append(latent_weight * metrics["cycle_latent_loss"])
        return torch.stack(losses).sum(), {**metrics}

    def _l2t_only(self, s: Step, step: int) -> tuple[Tensor, Metrics]:
        text, _ = self._encode(s, self._l2t_rows(s, s.latent))
        loss, _ = self._cross_entropy(s, text)
        return loss, {"base_l2t_text_loss": loss}

    def l2t(self, s: Step, latent: Tensor) -> Tensor:
        return s.padding.unpack(self._text_head(self._encode(s, self._l2t_rows(s, latent))[0]))

    def t2l(self, s: Step, tokens: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        return self._encode(s, Rows(tokens, z_t, t.new_zeros(1), t, ("latent",)))[1]

    def denoise(
        self, s: Step, tokens: Tensor, z_t: Tensor, text_t: Tensor, t: Tensor, masked: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        place = s.padding.pack(masked).nonzero()[:, 0]
        text, prediction = self._encode(s, Rows(tokens, z_t, text_t, t, ("text", "latent")))
        loss, _ = linear_cross_entropy(text[place], self._text_head, s.padding.pack(s.tokens)[place])
        return loss / count, prediction

    @property
    def _text_head(self) -> nn.Linear:
        return self.model.text_head  # type: ignore[return-value]

    def _encode(self, s: Step, *groups: Rows) -> tuple[Tensor, Tensor]:
        return self.model.encode(groups, s.padding)  # type: ignore[operator]

    def _t2l_rows(self, tokens: Tensor, z_t: Tensor, t: Tensor) -> Rows:
        return Rows(tokens, z_t, t.new_zeros(1), t[:1] if self.loss.latent_t_mode == "full" else t, ("latent",))

    def _l2t_rows(self, s: Step, latent: Tensor) -> Rows:
        return Rows(
            torch.full_like(s.tokens, self.mask_token_id), latent, latent.new_ones(1), latent.new_zeros(1), ("text",)
        )

    def _cross_entropy(self, s: Step, text: Tensor, pick: bool = False) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the text head's inputs [T, H], and pseudo-tokens [B, S] if picked."""
        uniform = None
        if pick and self.loss.cycle_latent_sampling == "categorical":
            uniform = s.padding.pack(s.noise.uniform("pseudo_tokens", self.max_seq_len)[:, : s.tokens.shape[1]])
        total, tokens = linear_cross_entropy(text, self._text_head, s.padding.pack(s.tokens), pick, uniform)
        return total / self.text_count(s), s.padding.unpack(tokens) if pick else tokens


def build_trainer(
    model: nn.Module, model_config: ModelConfig, loss: LossConfig, training: TrainingConfig, mask_token_id: int
) -> Trainer:
    """The trainer that model.implementation names."""
    trainer = FastTrainer if model_config.implementation == "fast" else Trainer
    return trainer(model, model_config, loss, training, mask_token_id)
