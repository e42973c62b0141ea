"""The latent noise schedule: z_t = alpha(t) z + sigma(t) eps, and what the latent head predicts. All of it float32.

alpha_bar is the cumulative product of (1 - beta) over `timesteps` betas (Ho et al. 2020, DDPM, eq. 4); the cosine
schedule is Nichol & Dhariwal 2021, eq. 17; v = alpha eps - sigma z is Salimans & Ho 2022, section 4. Timesteps t lie in
[0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def betas(timesteps: int, schedule: str, beta_min: float, beta_max: float) -> Tensor:
    """Betas [timesteps], float64. `schedule` is linear, cosine (clipped to [1e-4, 0.9999]) or sigmoid."""
    if schedule == "linear":
        return torch.linspace(beta_min, beta_max, timesteps, dtype=torch.float64)
    if schedule == "sigmoid":
        return torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid() * (beta_max - beta_min) + beta_min
    if schedule == "cosine":
        offset = 0.008
        x = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((x + offset) / (1 + offset) * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clip(1e-4, 0.9999)
    raise ValueError(f"unknown schedule {schedule}")


class LatentSchedule(nn.Module):
    """alpha(t), sigma(t) and conversions between z_t, eps, v and z (`parameterization`: epsilon, x0 or v_param).

    `interpolate` reads alpha_bar linearly between the table's entries; without it entry floor(t * (timesteps - 1)) is
    taken, as LGDLM does. Buffers are not part of the state_dict.
    """

    alpha_bar: Tensor

    def __init__(
        self,
        timesteps: int = 1000,
        schedule: str = "cosine",
        beta_min: float = 1e-4,
        beta_max: float = 0.02,
        parameterization: str = "v_param",
        interpolate: bool = True,
    ) -> None:
        super().__init__()
        self.parameterization = parameterization
        self.interpolate = interpolate
        alpha_bar = torch.cumprod(1 - betas(timesteps, schedule, beta_min, beta_max), dim=0)
        # Two tables, since 1 - alpha_bar computed in float32 loses sigma near t=0 and alpha near t=1.
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)
        self.register_buffer("one_minus_alpha_bar", (1 - alpha_bar).float(), persistent=False)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, each [B, 1] float32, of timesteps t [B] in [0, 1]."""
        place = t.float() * (self.alpha_bar.numel() - 1)
        low = place.long()
        tables = []
        for table in (self.alpha_bar, self.get_buffer("one_minus_alpha_bar")):
            value = table[low]
            if self.interpolate:
                value = torch.lerp(value, table[(low + 1).clamp(max=table.numel() - 1)], place - low)
            tables.append(value.sqrt()[:, None])
        return tables[0], tables[1]

    def add_noise(self, z: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the head's target, [B, D] each, from clean latents z, timesteps t [B], eps [B, D]."""
        alpha, sigma = self.alpha_sigma(t)
        z, noise = z.float(), noise.float()
        z_t = alpha * z + sigma * noise
        target = {"epsilon": noise, "x0": z, "v_param": alpha * noise - sigma * z}[self.parameterization]
        return z_t, target

    def predict_x0(self, z_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """Clean latents [B, D] that a prediction [B, D] at z_t [B, D], t [B] means. epsilon divides by alpha(t)."""
        prediction = prediction.float()
        if self.parameterization == "x0":
            return prediction
        alpha, sigma = self.alpha_sigma(t)
        if self.parameterization == "v_param":
            return alpha * z_t.float() - sigma * prediction
        return (z_t.float() - sigma * prediction) / alpha
