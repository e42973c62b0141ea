"""The objective: objective(batch, step) -> (loss, metrics). DDP wraps it, and the training loop knows no mode.

    cycle_vae       L2T + weighted T2L + the two cycle terms, on every batch
    l2t, t2l        one direction alone
    unconditional   text and latent both noisy
    random, sequential   one of the last three a step

L2T decodes: clean latent, masked text, reconstruct the tokens. T2L encodes: clean text, noisy latent, reconstruct the
latent.

Rows of cycle_vae may lack a half (job.row_kinds). A text alone has cycle_text only, which is back-translation
(Sennrich et al. 2016): it trains the decoder on the latent that the encoder predicts. A latent alone has cycle_latent.
The base terms need both halves.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from job.config import MODES, Config
from job.model.groups import Encoded, Group, TextTargets
from job.model.multimodal import MultimodalMMDiT
from job.objective import losses
from job.objective.inputs import Batch, Inputs
from job.objective.losses import ramp
from job.objective.noise import StepNoise, seed_for
from job.objective.schedule import LatentSchedule
from job.objective.text_masks import MaskedText, fully_masked, mask_at, mask_text
from job.row_kinds import LATENT, PAIRED, TEXT

Metrics = dict[str, Tensor | float]
Stage = Literal["whole", "base", "cycle"]
LARGEST_RANDOM_T = 0.9999  # a random latent timestep stays below 1, as in LGDLM


class NoisyLatent(NamedTuple):
    """The latents of a T2L pass."""

    t: Tensor  # [B] timesteps
    z_t: Tensor  # [B, D] noisy latents
    target: Tensor  # [B, D] what the latent head is to predict


class BaseTerms(NamedTuple):
    """What the base terms leave to the cycle terms: the first stage of a step returns it, the second is given it."""

    inputs: Inputs
    x0: dict[int, Tensor]  # [B, D] latents predicted from the texts (T2L), by kind of rows
    tokens: dict[int, Tensor]  # [B, S] texts decoded from the latents (L2T), by kind, where cycle_latent needs them
    loss: Tensor
    metrics: Metrics

    def detached(self) -> BaseTerms:
        """The same without the graph that made it, so that its activations can be freed."""
        metrics = {name: value.detach() if isinstance(value, Tensor) else value for name, value in self.metrics.items()}
        x0 = {kind: value.detach() for kind, value in self.x0.items()}
        return self._replace(x0=x0, loss=self.loss.detach(), metrics=metrics)


class Objective(nn.Module):
    """The objective that `config.loss` names, over a model of either implementation."""

    def __init__(
        self, model: MultimodalMMDiT, config: Config, mask_token_id: int, pad_token_id: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.loss, self.training_config, self.mask_token_id = config.loss, config.training, mask_token_id
        # Neither stands for a word: a decoded text has none of them.
        self.never_decoded = [mask_token_id] if pad_token_id is None else [mask_token_id, pad_token_id]
        self.t_eps, self.max_seq_len = config.model.t_eps, config.model.max_seq_len
        self.schedule = LatentSchedule(
            config.model.latent_timesteps,
            config.model.latent_beta_schedule,
            config.model.latent_beta_min,
            config.model.latent_beta_max,
            config.model.latent_parameterization,
            config.model.interpolate_schedule,
        )

    # What a step trains.

    def mode(self, step: int) -> str:
        """What 0-based `step` trains: cycle_vae, unconditional, l2t or t2l; the same on every rank."""
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

    def cycle_weights(self, step: int) -> tuple[float, float]:
        """Weights of cycle_text and cycle_latent as applied at a step."""
        c = self.loss
        return (
            ramp(step, c.cycle_text_weight, c.cycle_text_warmup_steps, c.cycle_text_ramp_steps),
            ramp(step, c.cycle_latent_weight, c.cycle_latent_warmup_steps, c.cycle_latent_ramp_steps),
        )

    def stages(self, step: int) -> tuple[Stage, ...]:
        """The forward and backward passes that make up a step, one after the other.

        With a stopped gradient nothing joins the cycle terms' graph to that of the base terms. Then each is
        differentiated by itself, which halves the activations that are alive. Both cycle terms must be on: only then
        does every parameter get a gradient in both stages, and DDP, which reduces in the last one, would wait for a
        gradient of the first.
        """
        both_cycles = self.mode(step) == "cycle_vae" and min(self.cycle_weights(step)) > 0
        staged = self.model.staged and both_cycles and self.loss.cycle_stop_grad_latent
        return ("base", "cycle") if staged else ("whole",)

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

    def forward(
        self,
        batch: Batch,
        step: int,
        stage: Stage = "whole",
        base: BaseTerms | None = None,
        noise: StepNoise | None = None,
    ) -> tuple[Tensor, Metrics, BaseTerms | None]:
        """Loss to minimize (scalar), metrics (scalars on the device, weights as numbers), and what the next stage is
        given.

        `batch` is described by `Inputs.of`; `step` is the 0-based optimizer step. The mean of the losses over all ranks
        and micro-batches is the loss of the global batch. Of `stages(step)`, "base" has no metrics yet and returns the
        BaseTerms that "cycle" takes; the sum of their losses is the loss of "whole". `noise` replaces the step's own
        draws.
        """
        if stage == "cycle":
            assert base is not None, 'stage "cycle" goes on from what stage "base" returned'
            loss, metrics = self._cycle_terms(base, step)
            return loss, {**base.metrics, **metrics, "loss": base.loss + loss.detach()}, None
        s = Inputs.of(batch, self.training_config.seed, step, self.loss.ce_over_padding, noise)
        mode = self.mode(step)
        if mode == "cycle_vae":
            return self._cycle_vae(s, step, stage)
        loss, metrics = {"l2t": self._l2t_alone, "t2l": self._t2l_alone, "unconditional": self._unconditional}[mode](s)
        return loss, {"loss": loss, **metrics}, None

    # cycle_vae: the base terms, and the cycle terms that go on from them.

    def _cycle_vae(self, s: Inputs, step: int, stage: Stage) -> tuple[Tensor, Metrics, BaseTerms | None]:
        base = self._base_terms(s, step)
        if stage == "base":
            return base.loss, {}, base.detached()
        loss, metrics = base.loss, base.metrics
        if max(self.cycle_weights(step)) > 0:
            cycle, cycle_metrics = self._cycle_terms(base, step)
            loss, metrics = loss + cycle, {**metrics, **cycle_metrics}
        return loss, {"loss": loss, **metrics}, None

    def _base_terms(self, s: Inputs, step: int) -> BaseTerms:
        """L2T cross-entropy + latent_loss_weight * T2L latent loss; both passes go through the model as one batch."""
        text_weight, latent_weight = self.cycle_weights(step)
        paired = s.part(PAIRED, (PAIRED,))
        noisy = self.noisy_latent(paired, "latent")
        text = self.masked_text(paired, "base_text")
        encoded = self._encode(paired, self._t2l_group(paired.tokens, noisy), self._l2t_group(text, paired.latent))
        base_latent = self._latent_loss(paired, encoded, noisy)
        # The cycle starts from what is decoded of the latent alone: of a text that was shown in part, by a pass of its
        # own.
        pick_here = latent_weight > 0 and text.counted is None
        base_text, tokens = self._text_loss(paired, encoded, text, pick=pick_here)
        x0 = self.schedule.predict_x0(noisy.z_t, noisy.t, encoded.latent)
        metrics: Metrics = {
            "base_l2t_text_loss": base_text,
            "base_t2l_latent_loss": base_latent,
            "cycle_text_weight": text_weight,
            "cycle_latent_weight": latent_weight,
            **self._latent_metrics(paired, noisy, encoded.latent, x0),
        }
        predicted, decoded = {PAIRED: x0}, {}
        if text_weight > 0 and s.has(TEXT):
            predicted[TEXT] = self._predicted_of_text_alone(s.part(TEXT, (TEXT,)))
        if latent_weight > 0:
            decoded[PAIRED] = self._decoded(paired) if tokens is None else tokens
        if latent_weight > 0 and s.has(LATENT):
            decoded[LATENT] = self._decoded(s.part(LATENT, (LATENT,)))
        return BaseTerms(s, predicted, decoded, base_text + self.loss.latent_loss_weight * base_latent, metrics)

    def _predicted_of_text_alone(self, s: Inputs) -> Tensor:
        """Latents [B, D] predicted from texts whose own latents are not known: from pure noise, at the largest t.

        At any other timestep T2L would be shown a part of the latent.
        """
        largest = 1.0 if self.loss.latent_t_mode == "full" else LARGEST_RANDOM_T
        t = s.timesteps(largest)
        noise = s.noise.normal("latent_noise", s.latent.shape[1])
        group = Group(s.tokens, noise, t.new_zeros(1), t[:1], ("latent",))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.loss.cycle_stop_grad_latent):
            return self.schedule.predict_x0(noise, t, self._encode(s, group).latent)

    def _cycle_terms(self, base: BaseTerms, step: int) -> tuple[Tensor, Metrics]:
        """The cycle terms whose weight is not zero, times their weights; the rows of each kind as one batch again.

        cycle_text (T2L2T): cross-entropy of the text decoded from the latent that was predicted from it.
        cycle_latent (L2T2L): latent loss of T2L from the tokens decoded from the latent; no gradient passes the tokens.
        """
        s = base.inputs
        text_weight, latent_weight = self.cycle_weights(step)
        with_text = self._kinds_of_cycle_text(s) if text_weight > 0 else ()
        with_latent = tuple(kind for kind in (PAIRED, LATENT) if s.has(kind)) if latent_weight > 0 else ()
        cycle_text: list[Tensor] = []
        cycle_latent: list[Tensor] = []
        for kind in (PAIRED, TEXT, LATENT):
            groups: list[Group] = []
            if kind in with_latent:
                latents = s.part(kind, with_latent)
                noisy = self.noisy_latent(latents, "cycle_latent")
                groups.append(self._t2l_group(base.tokens[kind], noisy))
            if kind in with_text:
                texts = s.part(kind, with_text)
                text = self.masked_text(texts, "cycle_text")
                x0 = base.x0[kind]
                groups.append(self._l2t_group(text, x0.detach() if self.loss.cycle_stop_grad_latent else x0))
            if not groups:
                continue
            encoded = self._encode(latents if kind in with_latent else texts, *groups)
            if kind in with_text:
                cycle_text.append(self._text_loss(texts, encoded, text)[0])
            if kind in with_latent:
                cycle_latent.append(self._latent_loss(latents, encoded, noisy))
        terms: list[Tensor] = []
        metrics: Metrics = {}
        if cycle_text:
            metrics["cycle_text_loss"] = total = torch.stack(cycle_text).sum()
            terms.append(text_weight * total)
        if cycle_latent:
            metrics["cycle_latent_loss"] = total = torch.stack(cycle_latent).sum()
            terms.append(latent_weight * total)
        return torch.stack(terms).sum(), metrics

    def _kinds_of_cycle_text(self, s: Inputs) -> tuple[int, ...]:
        """Kinds of rows that cycle_text is computed on (loss.cycle_text_on)."""
        wanted = {"all": (PAIRED, TEXT), "paired": (PAIRED,), "unpaired": (TEXT,)}[self.loss.cycle_text_on]
        return tuple(kind for kind in wanted if s.has(kind))

    # The other modes.

    def _l2t_alone(self, s: Inputs) -> tuple[Tensor, Metrics]:
        text = self.masked_text(s, "base_text")
        loss, _ = self._text_loss(s, self._encode(s, self._l2t_group(text, s.latent)), text)
        return loss, {"base_l2t_text_loss": loss}

    def _t2l_alone(self, s: Inputs) -> tuple[Tensor, Metrics]:
        noisy = self.noisy_latent(s, "latent")
        encoded = self._encode(s, self._t2l_group(s.tokens, noisy))
        loss = self._latent_loss(s, encoded, noisy)
        x0 = self.schedule.predict_x0(noisy.z_t, noisy.t, encoded.latent)
        metrics: Metrics = {"base_t2l_latent_loss": loss, **self._latent_metrics(s, noisy, encoded.latent, x0)}
        return self.loss.latent_loss_weight * loss, metrics

    def _unconditional(self, s: Inputs) -> tuple[Tensor, Metrics]:
        """Both modalities noisy: masked diffusion of the text with a linear schedule, and the latent."""
        text_t = s.noise.uniform_of_all("text_t")
        mask_ratio = (1 - self.t_eps) * text_t.clamp(min=self.t_eps)
        text = mask_at(s, mask_ratio, self.mask_token_id, self.max_seq_len, "text")
        noisy = self._noise(s, s.noise.uniform("latent_t"), "latent")
        group = Group(text.tokens, noisy.z_t, text_t[s.noise.position], noisy.t, ("text", "latent"))
        encoded = self._encode(s, group)
        text_loss, _ = self._text_loss(s, encoded, text)
        latent_loss = self._latent_loss(s, encoded, noisy)
        x0 = self.schedule.predict_x0(noisy.z_t, noisy.t, encoded.latent)
        metrics: Metrics = {
            "text_loss": text_loss,
            "latent_loss": latent_loss,
            **self._latent_metrics(s, noisy, encoded.latent, x0),
        }
        return text_loss + self.loss.latent_loss_weight * latent_loss, metrics

    # One direction each, for evaluation and sampling.

    def l2t(self, s: Inputs, latent: Tensor) -> Tensor:
        """Text logits [B, S, V] decoded from latents [B, D] taken as clean, the text fully masked."""
        text = fully_masked(s, self.mask_token_id)
        return self.model.logits(self._encode(s, self._l2t_group(text, latent)).text, s.padding)

    def t2l(self, s: Inputs, tokens: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The latent head's prediction [B, D] from clean text [B, S] and noisy latents [B, D] at timesteps t [B]."""
        return self._encode(s, Group(tokens, z_t, t.new_zeros(1), t, ("latent",))).latent

    # What the terms are made of.

    def noisy_latent(self, s: Inputs, name: str) -> NoisyLatent:
        """The latents of a T2L pass, at t = 1 or at random timesteps (loss.latent_t_mode); draws are named after
        `name`.
        """
        if self.loss.latent_t_mode == "full":
            return self._noise(s, s.timesteps(1.0), name)
        low, high = self.loss.cycle_latent_t_min, self.loss.cycle_latent_t_max
        t = low + (high - low) * s.noise.uniform(f"{name}_t")
        return self._noise(s, t.clamp(max=LARGEST_RANDOM_T), name)

    def _noise(self, s: Inputs, t: Tensor, name: str) -> NoisyLatent:
        noise = s.noise.normal(f"{name}_noise", s.latent.shape[1])
        return NoisyLatent(t, *self.schedule.add_noise(s.latent, t, noise))

    def _t2l_group(self, tokens: Tensor, noisy: NoisyLatent) -> Group:
        """Rows of a T2L pass: clean texts [B, S], noisy latents."""
        shared = self.loss.latent_t_mode == "full"
        return Group(tokens, noisy.z_t, noisy.t.new_zeros(1), noisy.t[:1] if shared else noisy.t, ("latent",))

    def masked_text(self, s: Inputs, name: str) -> MaskedText:
        """The texts of an L2T pass, fully or partly masked (loss.text_t_mode); draws are named after `name`."""
        return mask_text(s, self.loss, self.mask_token_id, self.max_seq_len, name)

    def _l2t_group(self, text: MaskedText, latent: Tensor) -> Group:
        """Rows of an L2T pass: masked texts, latents [B, D] taken as clean."""
        return Group(text.tokens, latent, text.t, latent.new_zeros(1), ("text",))

    def _encode(self, s: Inputs, *groups: Group) -> Encoded:
        return self.model.encode(groups, s.padding)

    def _text_loss(
        self, s: Inputs, encoded: Encoded, text: MaskedText, pick: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of an encoded text to the step's own, and with `pick` tokens [B, S] decoded from it.

        Tokens are taken as loss.cycle_latent_sampling says.
        """
        uniform = None
        if pick and self.loss.cycle_latent_sampling == "categorical":
            # Drawn for max_seq_len positions, so that a batch's padding does not change the draw.
            uniform = s.noise.uniform("pseudo_tokens", self.max_seq_len)[:, : s.tokens.shape[1]]
        targets = TextTargets(s.tokens, text.counted, text.row_weights, pick, uniform)
        total, tokens = self.model.text_loss(encoded.text, targets, s.padding)
        return total / text.denominator, tokens

    @torch.no_grad()
    def _decoded(self, s: Inputs) -> Tensor:
        """Tokens [B, S] decoded from the batch's latents in one pass over fully masked texts."""
        text = fully_masked(s, self.mask_token_id)
        _, tokens = self._text_loss(s, self._encode(s, self._l2t_group(text, s.latent)), text, pick=True)
        assert tokens is not None
        return tokens

    def _latent_loss(self, s: Inputs, encoded: Encoded, noisy: NoisyLatent) -> Tensor:
        loss = losses.latent_loss(encoded.latent, noisy.target, self.loss.normalize_latent_loss)
        return s.row_weight * loss

    @torch.no_grad()
    def _latent_metrics(self, s: Inputs, noisy: NoisyLatent, prediction: Tensor, x0: Tensor) -> Metrics:
        return {
            "t_lat_mean": s.row_weight * noisy.t.mean(),
            "latent_pred_norm": s.row_weight * prediction.float().norm(dim=-1).mean(),
            "x0_pred_norm": s.row_weight * x0.norm(dim=-1).mean(),
        }
