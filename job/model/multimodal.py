"""MultimodalMMDiT: text tokens and one latent vector through a joint transformer.

The keys and shapes of its weights are those of LGDLM's model. Two implementations share them: `job.model.plain` and
`job.model.fast`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from job.config import ModelConfig
from job.model.backbone import build_backbone
from job.model.groups import Encoded, Group, Padding, TextLoss, TextTargets

BOTH_HEADS = ("text", "latent")


class TextEncoder(nn.Module):
    """Token and position embeddings: [B, S] -> [B, S, H]."""

    def __init__(self, vocab_size: int, hidden_size: int, max_seq_len: int) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(vocab_size, hidden_size)
        self.position_embed = nn.Parameter(torch.randn(1, max_seq_len, hidden_size) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embed(tokens) + self.position_embed[:, : tokens.shape[1]]


class LatentEncoder(nn.Module):
    """One latent vector as one token: [B, D] -> [B, 1, H]."""

    def __init__(self, latent_dim: int, hidden_size: int) -> None:
        super().__init__()
        width = 2 * hidden_size
        self.projection = nn.Sequential(
            nn.Linear(latent_dim, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, hidden_size),
        )
        self.position_embed = nn.Parameter(torch.randn(1, 1, hidden_size) * 0.02)

    def forward(self, latents: Tensor) -> Tensor:
        return self.projection(latents[:, None]) + self.position_embed


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of scale * t (Vaswani et al. 2017, section 3.5) through an MLP: [B] -> [B, cond_dim]."""

    frequencies: Tensor

    def __init__(self, cond_dim: int, scale: float, features: int = 256, longest_period: float = 10000.0) -> None:
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(features, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        half = features // 2
        frequencies = torch.exp(-math.log(longest_period) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        # In float32: bf16 tells only 496 of 980 neighbouring timesteps apart, and takes 0.9999 for 1.
        angles = self.scale * t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Conditioning(nn.Module):
    """Both timesteps as one vector: [B], [B] -> [B, cond_dim]."""

    def __init__(self, cond_dim: int, scale: float) -> None:
        super().__init__()
        self.text_sigma_map = TimestepEmbedder(cond_dim, scale)
        self.latent_sigma_map = TimestepEmbedder(cond_dim, scale)
        self.combine = nn.Sequential(
            nn.Linear(2 * cond_dim, 4 * cond_dim),
            nn.SiLU(),
            nn.Linear(4 * cond_dim, cond_dim),
        )

    def forward(self, text_timesteps: Tensor, latent_timesteps: Tensor) -> Tensor:
        text, latent = self.text_sigma_map(text_timesteps), self.latent_sigma_map(latent_timesteps)
        return self.combine(torch.cat([F.silu(text), F.silu(latent)], dim=-1))


class MultimodalMMDiT(nn.Module):
    """Text and latent streams through the mmdit backbone, with a head for each."""

    mmdit: nn.Module
    vocab_size: int
    latent_dim: int
    staged: bool  # whether a step of two independent halves is best differentiated one half after the other

    def __init__(self, config: ModelConfig, vocab_size: int, latent_dim: int) -> None:
        super().__init__()
        self.vocab_size, self.latent_dim, self.max_seq_len = vocab_size, latent_dim, config.max_seq_len
        self.num_residual_streams = config.num_residual_streams
        hidden = config.hidden_size
        self.text_encoder = TextEncoder(vocab_size, hidden, config.max_seq_len)
        self.latent_encoder = LatentEncoder(latent_dim, hidden)
        self.conditioning = Conditioning(config.cond_dim, config.time_scale)
        self.mmdit = build_backbone(config)
        self.text_head = nn.Linear(hidden, vocab_size)
        to_latent = nn.Linear(2 * hidden, latent_dim)
        self.latent_head = nn.Sequential(
            nn.Linear(hidden, 2 * hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            to_latent,
        )
        for linear in (self.text_head, to_latent):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        text_tokens: Tensor,
        latents: Tensor,
        text_timesteps: Tensor,
        latent_timesteps: Tensor,
        attention_mask: Tensor,
        heads: tuple[str, ...] = BOTH_HEADS,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Text logits [B, S, V] and latent prediction [B, D] by the stock blocks; None for a head not asked for.

        text_tokens [B, S] int64, latents [B, D], timesteps [B] in [0, 1] (0 is clean), attention_mask [B, S] bool (True
        on real tokens).
        """
        text, latent = self.mmdit(
            modality_tokens=(self.text_encoder(text_tokens), self.latent_encoder(latents)),
            modality_masks=(attention_mask, None),
            time_cond=self.conditioning(text_timesteps, latent_timesteps),
        )
        logits = self.text_head(text) if "text" in heads else None
        prediction = self.latent_head(latent[:, 0]) if "latent" in heads else None
        return logits, prediction

    def encode(self, groups: Sequence[Group], padding: Padding) -> Encoded:
        """Groups of B rows, whose text lengths `padding` gives, through the model."""
        raise NotImplementedError

    def logits(self, text: Tensor, padding: Padding) -> Tensor:
        """Logits [B, S, V] of an encoded text; anything on positions that are not computed."""
        raise NotImplementedError

    def text_loss(self, text: Tensor, targets: TextTargets, padding: Padding) -> TextLoss:
        """Cross-entropy of an encoded text to its targets, summed over the places that count, and decoded tokens.

        No gradient passes the tokens.
        """
        raise NotImplementedError
