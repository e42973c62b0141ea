"""Making one modality from the other, or both from noise: text by unmasking, latents by DDIM."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from job.objective.noise import StepNoise
from job.objective.trainer import Trainer


@torch.no_grad()
def generate(
    trainer: Trainer,
    mask: Tensor,
    *,
    tokens: Tensor | None = None,
    latent: Tensor | None = None,
    steps: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, S] and latents [B, D] for texts of the lengths in mask [B, S] (True on real tokens); what is given is kept.

    Each of `steps` passes fills in the positions whose tokens are surest (MaskGIT, Chang et al. 2022) and moves the latent along the
    deterministic path (DDIM, Song et al. 2021). One pass is what l2t, t2l and cycle_vae train; more need a model that was trained on
    partly noisy input (unconditional steps; for latents also loss.latent_t_mode=random). Temperature 0 takes the likeliest tokens.
    """
    device, (rows, length) = mask.device, mask.shape
    noise = StepNoise(seed, 0, torch.arange(rows), rows)
    words = torch.where(mask, trainer.mask_token_id, 0) if tokens is None else tokens
    z = noise.normal("sample_latent", cast(int, trainer.model.latent_dim)).to(device) if latent is None else latent
    heads = (*(("text",) if tokens is None else ()), *(("latent",) if latent is None else ()))
    for step in range(steps if heads else 0):
        now, after = (torch.full((rows,), 1 - k / steps, device=device) for k in (step, step + 1))
        clean = torch.zeros_like(now)
        logits, prediction = trainer.model(
            words, z, now if tokens is None else clean, now if latent is None else clean, mask, heads=heads
        )
        if latent is None:
            z = ddim_step(trainer, z, now, after, prediction)
        if tokens is None:
            gumbel = (
                -(-noise.uniform(f"sample_text_{step}", length, logits.shape[-1]).clamp(min=1e-20).log())
                .log()
                .to(device)
                if temperature
                else 0.0
            )
            words = unmask(
                words,
                logits.float() + temperature * gumbel,
                trainer.mask_token_id,
                mask.sum(1) * (steps - step - 1) // steps,
            )
    return words, z


def ddim_step(trainer: Trainer, z: Tensor, now: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
    """Latents [B, D] at timesteps `after` [B] on the deterministic path through z [B, D] at `now` [B]; the clean ones for 0."""
    x0 = trainer.schedule.predict_x0(z, now, prediction)
    alpha, sigma = trainer.schedule.alpha_sigma(now)
    eps = (z - alpha * x0) / sigma
    alpha, sigma = trainer.schedule.alpha_sigma(after)
    return torch.where(after[:, None] > 0, alpha * x0 + sigma * eps, x0)


def unmask(words: Tensor, logits: Tensor, mask_token_id: int, left: Tensor) -> Tensor:
    """Replace masked words [B, S] by the likeliest tokens of logits [B, S, V], but for `left` [B] positions, the least sure of each row."""
    logits = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    confidence, best = logits.log_softmax(-1).max(-1)
    masked = words == mask_token_id
    rank = confidence.masked_fill(~masked, torch.inf).argsort(dim=1).argsort(dim=1)  # 0: the least sure
    return torch.where(masked & (rank >= left[:, None]), best, words)
