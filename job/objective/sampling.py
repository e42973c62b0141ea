"""Making one modality from the other, or both from noise: text by unmasking, latents by DDIM."""

from __future__ import annotations

import torch
from torch import Tensor

from job.model.groups import Group, Padding
from job.objective.noise import RowNoise
from job.objective.objective import Objective
from job.objective.schedule import LatentSchedule


@torch.no_grad()
def generate(
    objective: Objective,
    mask: Tensor,
    *,
    tokens: Tensor | None = None,
    latent: Tensor | None = None,
    steps: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, S] and latents [B, D] for texts of the lengths in mask [B, S] (True on real tokens); what is given is
    kept.

    Each of `steps` passes fills in the positions whose tokens are surest (MaskGIT, Chang et al. 2022) and moves the
    latent along the deterministic path (DDIM, Song et al. 2021). One pass is what l2t, t2l and cycle_vae train; more
    need a model that was trained on partly noisy input (unconditional steps; for latents also
    loss.latent_t_mode=random). Temperature 0 takes the likeliest tokens.

    A row's noise is drawn by the seed and its number in `numbers` [B]; None counts the rows from 0.
    """
    device, rows = mask.device, len(mask)
    model, mask_token_id = objective.model, objective.mask_token_id
    # Drawn on the CPU, the same for every device.
    noise = RowNoise(seed, torch.arange(rows) if numbers is None else numbers)
    padding = Padding(mask, keep=False, lengths=mask.sum(1).tolist())
    words = torch.where(mask, mask_token_id, 0) if tokens is None else tokens
    z = noise.normal("sample_latent", model.latent_dim).to(device) if latent is None else latent
    wanted = {"text": tokens is None, "latent": latent is None}
    heads = tuple(head for head, is_wanted in wanted.items() if is_wanted)
    for step in range(steps if heads else 0):
        now, after = (torch.full((1,), 1 - k / steps, device=device) for k in (step, step + 1))
        clean = torch.zeros_like(now)
        text_t, latent_t = (now if wanted[head] else clean for head in ("text", "latent"))
        encoded = model.encode([Group(words, z, text_t, latent_t, heads)], padding)
        if wanted["latent"]:
            z = ddim_step(objective.schedule, z, now.expand(rows), after.expand(rows), encoded.latent)
        if wanted["text"]:
            logits = model.logits(encoded.text, padding).float()
            if temperature:
                logits = logits + temperature * gumbel(noise, f"sample_text_{step}", *logits.shape[1:]).to(device)
            still_masked = mask.sum(1) * (steps - step - 1) // steps
            words = unmask(words, logits, mask_token_id, still_masked)
    return words, z


def gumbel(noise: RowNoise, name: str, *shape: int) -> Tensor:
    """Gumbel draws [B, *shape]: the likeliest token of logits + temperature * draw is a sample of softmax(logits /
    temperature).
    """
    return -(-noise.uniform(name, *shape).clamp(min=1e-20).log()).log()


def ddim_step(schedule: LatentSchedule, z: Tensor, now: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
    """Latents [B, D] at timesteps `after` [B] on the deterministic path through z [B, D] at `now` [B]; clean ones for
    0.

    Song et al. 2021, DDIM, eq. 12 with sigma = 0.
    """
    x0 = schedule.predict_x0(z, now, prediction)
    alpha, sigma = schedule.alpha_sigma(now)
    eps = (z - alpha * x0) / sigma
    alpha, sigma = schedule.alpha_sigma(after)
    return torch.where(after[:, None] > 0, alpha * x0 + sigma * eps, x0)


def unmask(words: Tensor, logits: Tensor, mask_token_id: int, left: Tensor) -> Tensor:
    """Masked words [B, S] replaced by the likeliest tokens of logits [B, S, V], but for `left` [B] of each row.

    Those left masked are the least sure ones. The mask token itself is never taken.
    """
    logits = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    confidence, best = logits.log_softmax(-1).max(-1)
    masked = words == mask_token_id
    rank = confidence.masked_fill(~masked, torch.inf).argsort(dim=1).argsort(dim=1)  # 0: the least sure
    return torch.where(masked & (rank >= left[:, None]), best, words)
