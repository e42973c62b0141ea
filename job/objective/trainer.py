"""The objective as one module: trainer(batch, step) -> (loss, metrics). DDP wraps it, and the loop knows no mode.

A batch holds input_ids [B, S], attention_mask [B, S] (True on real tokens), latent [B, D], and, when it is a part of a global
batch, position [B] (rows in the global batch) and global_lengths [G] (token counts of the global batch). Its row_lengths, a list
of B numbers that the host knows already, saves the fast path from asking the device for them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from job.config import MODES, LossConfig, ModelConfig, TrainingConfig
from job.model.groups import Padding
from job.objective.losses import latent_loss, ramp, text_cross_entropy
from job.objective.noise import StepNoise, seed_for
from job.objective.schedule import LatentSchedule

Batch = Mapping[str, Any]  # tensors, but for row_lengths
Metrics = dict[str, Tensor | float]


@dataclass
class Step:
    """What every term of one step needs: the rows, the draws, and this rank's share of the counted tokens."""

    tokens: Tensor  # [B, S]
    mask: Tensor  # [B, S] bool
    latent: Tensor  # [B, D]
    lengths: Tensor  # [G]
    noise: StepNoise
    keep_padding: bool = False  # compute text that is padding too
    row_lengths: list[int] | None = None  # [B]

    @cached_property
    def padding(self) -> Padding:
        return Padding(self.mask, self.keep_padding, self.row_lengths or self.mask.sum(1).tolist())

    @property
    def share(self) -> float:
        """This micro-batch's part of the global batch."""
        return self.tokens.shape[0] / self.lengths.shape[0]

    def timesteps(self, value: float) -> Tensor:
        return torch.full((self.tokens.shape[0],), value, device=self.tokens.device)


class Trainer(nn.Module):
    """The objective over a model called as model(tokens, latents, text_timesteps, latent_timesteps, attention_mask, heads=...)."""

    def __init__(
        self,
        model: nn.Module,
        model_config: ModelConfig,
        loss: LossConfig,
        training: TrainingConfig,
        mask_token_id: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.schedule = LatentSchedule(
            model_config.latent_timesteps,
            model_config.latent_beta_schedule,
            model_config.latent_beta_min,
            model_config.latent_beta_max,
            model_config.latent_parameterization,
            model_config.interpolate_schedule,
        )
        self.loss, self.training_config = loss, training
        self.t_eps, self.max_seq_len, self.mask_token_id = model_config.t_eps, model_config.max_seq_len, mask_token_id

    def mode(self, step: int) -> str:
        """What this step trains: cycle_vae, unconditional, l2t or t2l; the same on every rank."""
        if self.loss.loss_type == "random":
            draw = random.Random(seed_for("mode", self.training_config.seed, step))
            return draw.choices(MODES, weights=self.training_config.mode_weights)[0]
        if self.loss.loss_type == "sequential":
            schedule = self.training_config.sequential_schedule
            place = step % sum(item.steps for item in schedule)
            for item in schedule:
                if place < item.steps:
                    return item.type
                place -= item.steps
        return self.loss.loss_type

    def stages(self, step: int) -> int:
        """How many forward and backward passes, one after the other, make up this step: call with stage 0, 1, ..."""
        return 1

    def forward(
        self, batch: Batch, step: int, noise: StepNoise | None = None, stage: int | None = None
    ) -> tuple[Tensor, Metrics]:
        """Loss to minimize (scalar) and the metrics of the step (scalars, on the device) for 0-based optimizer step `step`.

        `noise` replaces the step's own draws. The mean of the losses over all ranks and micro-batches is the loss of the
        global batch.
        """
        tokens = batch["input_ids"]
        mask = batch["attention_mask"].bool()
        position = batch.get("position", torch.arange(tokens.shape[0], device=tokens.device))
        lengths = batch.get("global_lengths", mask.sum(1))
        noise = noise or StepNoise(self.training_config.seed, step, position, lengths.shape[0])
        latent = batch["latent"].float()
        s = Step(
            tokens,
            mask,
            latent[:, 0] if latent.dim() == 3 else latent,
            lengths,
            noise,
            self.loss.ce_over_padding,
            batch.get("row_lengths"),
        )
        terms = {
            "cycle_vae": self._cycle_vae,
            "l2t": self._l2t_only,
            "t2l": self._t2l_only,
            "unconditional": self._unconditional,
        }
        loss, metrics = terms[self.mode(step)](s, step)
        return loss, {"loss": loss, **metrics}

    # One direction each: the decoder and the encoder.

    def l2t(self, s: Step, latent: Tensor) -> Tensor:
        """Text logits [B, S, V] decoded from latents [B, D] taken as clean, the text fully masked."""
        logits, _ = self.model(
            torch.full_like(s.tokens, self.mask_token_id),
            latent,
            s.timesteps(1.0),
            s.timesteps(0.0),
            s.mask,
            heads=("text",),
        )
        return logits

    def t2l(self, s: Step, tokens: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The latent head's prediction [B, D] from clean text [B, S] and noisy latents z_t [B, D] at t [B]."""
        _, prediction = self.model(tokens, z_t, s.timesteps(0.0), t, s.mask, heads=("latent",))
        return prediction

    def cross_entropy(self, s: Step, logits: Tensor) -> Tensor:
        """Cross-entropy of logits [B, S, V] to the step's text."""
        return text_cross_entropy(
            logits, s.tokens, torch.ones_like(s.mask) if self.loss.ce_over_padding else s.mask, self.text_count(s)
        )

    def text_count(self, s: Step) -> Tensor | int:
        """This rank's share of the tokens in the text loss."""
        return s.tokens.numel() if self.loss.ce_over_padding else s.lengths.sum() * s.share

    def draw_t(self, s: Step, name: str) -> Tensor:
        """Latent timesteps [B] of T2L: 1, or random in [cycle_latent_t_min, cycle_latent_t_max] and below 1."""
        if self.loss.latent_t_mode == "full":
            return s.timesteps(1.0)
        low, high = self.loss.cycle_latent_t_min, self.loss.cycle_latent_t_max
        return (low + (high - low) * s.noise.uniform(name)).clamp(max=0.9999)

    def noisy_latent(self, s: Step, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps t [B], noisy latents z_t [B, D] and the head's target [B, D] of a T2L pass."""
        t = self.draw_t(s, f"{name}_t")
        z_t, target = self.schedule.add_noise(s.latent, t, s.noise.normal(f"{name}_noise", s.latent.shape[1]))
        return t, z_t, target

    # The modes.

    def _l2t_only(self, s: Step, step: int) -> tuple[Tensor, Metrics]:
        loss = self.cross_entropy(s, self.l2t(s, s.latent))
        return loss, {"base_l2t_text_loss": loss}

    def _t2l_only(self, s: Step, step: int) -> tuple[Tensor, Metrics]:
        t, z_t, target = self.noisy_latent(s, "latent")
        prediction = self.t2l(s, s.tokens, z_t, t)
        loss = latent_loss(prediction, target, self.loss.normalize_latent_loss)
        return self.loss.latent_loss_weight * loss, {
            "base_t2l_latent_loss": loss,
            **self._latent_metrics(t, prediction, z_t),
        }

    def _unconditional(self, s: Step, step: int) -> tuple[Tensor, Metrics]:
        """Both modalities noised (masked diffusion of the text with a linear schedule, Sahoo et al. 2024, MDLM)."""
        seq_len = s.tokens.shape[1]
        text_t = s.noise.uniform_of_all("text_t")
        masked_of_all = (
            s.noise.uniform_of_all("text_mask", self.max_seq_len)[:, :seq_len]
            < ((1 - self.t_eps) * text_t.clamp(min=self.t_eps))[:, None]
        )
        masked_of_all &= torch.arange(seq_len, device=s.tokens.device) < s.lengths[:, None]
        masked = masked_of_all[s.noise.position]
        t = s.noise.uniform("latent_t")
        z_t, target = self.schedule.add_noise(s.latent, t, s.noise.normal("latent_noise", s.latent.shape[1]))
        count = masked_of_all.sum().clamp(min=1) * s.share
        text, prediction = self.denoise(
            s, torch.where(masked, self.mask_token_id, s.tokens), z_t, text_t[s.noise.position], t, masked, count
        )
        latent = latent_loss(prediction, target, self.loss.normalize_latent_loss)
        metrics: Metrics = {"text_loss": text, "latent_loss": latent, **self._latent_metrics(t, prediction, z_t)}
        return text + self.loss.latent_loss_weight * latent, metrics

    def denoise(
        self, s: Step, tokens: Tensor, z_t: Tensor, text_t: Tensor, t: Tensor, masked: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both heads at noisy text and latents: the cross-entropy of the `masked` tokens over `count`, and the latent prediction [B, D]."""
        logits, prediction = self.model(tokens, z_t, text_t, t, s.mask, heads=("text", "latent"))
        return text_cross_entropy(logits, s.tokens, masked, count), prediction

    def _cycle_vae(self, s: Step, step: int) -> tuple[Tensor, Metrics]:
        """L2T cross-entropy + weighted T2L latent loss + the two ramped cycle terms; a term of weight zero is not computed."""
        c = self.loss
        text_weight, latent_weight = self.cycle_weights(step)
        t, z_t, target = self.noisy_latent(s, "latent")
        prediction = self.t2l(s, s.tokens, z_t, t)
        base_latent = latent_loss(prediction, target, c.normalize_latent_loss)
        logits = self.l2t(s, s.latent)
        base_text = self.cross_entropy(s, logits)
        total = base_text + c.latent_loss_weight * base_latent
        metrics: Metrics = {
            "base_l2t_text_loss": base_text,
            "base_t2l_latent_loss": base_latent,
            "cycle_text_weight": text_weight,
            "cycle_latent_weight": latent_weight,
            **self._latent_metrics(t, prediction, z_t),
        }
        if text_weight > 0:
            metrics["cycle_text_loss"] = self.cycle_text(s, self.schedule.predict_x0(z_t, t, prediction))
            total = total + text_weight * metrics["cycle_text_loss"]
        if latent_weight > 0:
            metrics["cycle_latent_loss"] = self.cycle_latent(s, logits)
            total = total + latent_weight * metrics["cycle_latent_loss"]
        return total, metrics

    def cycle_weights(self, step: int) -> tuple[float, float]:
        """Weights of cycle_text and cycle_latent as applied at a step."""
        c = self.loss
        return (
            ramp(step, c.cycle_text_weight, c.cycle_text_warmup_steps, c.cycle_text_ramp_steps),
            ramp(step, c.cycle_latent_weight, c.cycle_latent_warmup_steps, c.cycle_latent_ramp_steps),
        )

    def cycle_text(self, s: Step, x0: Tensor) -> Tensor:
        """T2L2T: cross-entropy of the text decoded from the latent x0 [B, D] that was predicted from the text."""
        return self.cross_entropy(s, self.l2t(s, x0.detach() if self.loss.cycle_stop_grad_latent else x0))

    def cycle_latent(self, s: Step, logits: Tensor) -> Tensor:
        """L2T2L: latent loss of T2L from pseudo-tokens of the decoded logits [B, S, V]; no gradient passes the tokens."""
        t, z_t, target = self.noisy_latent(s, "cycle_latent")
        prediction = self.t2l(s, self.pseudo_tokens(s, logits), z_t, t)
        return latent_loss(prediction, target, self.loss.normalize_latent_loss)

    @torch.no_grad()
    def pseudo_tokens(self, s: Step, logits: Tensor) -> Tensor:
        """Tokens [B, S] of logits [B, S, V]: the most likely ones, or drawn (by inverting the distribution function at one
        uniform number a position, so that the draw is a function of the step)."""
        if self.loss.cycle_latent_sampling == "argmax":
            return logits.argmax(-1)
        uniform = s.noise.uniform("pseudo_tokens", self.max_seq_len)[:, : s.tokens.shape[1], None]
        distribution = logits.float().softmax(-1).cumsum(-1)
        return (
            torch.searchsorted(distribution, uniform * distribution[..., -1:])
            .squeeze(-1)
            .clamp(max=logits.shape[-1] - 1)
        )

    def _latent_metrics(self, t: Tensor, prediction: Tensor, z_t: Tensor) -> Metrics:
        with torch.no_grad():
            x0 = self.schedule.predict_x0(z_t, t, prediction)
            return {
                "t_lat_mean": t.mean(),
                "latent_pred_norm": prediction.float().norm(dim=-1).mean(),
                "x0_pred_norm": x0.norm(dim=-1).mean(),
            }
