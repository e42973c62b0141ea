"""MultimodalMMDiT: text tokens and one latent vector through a joint transformer. Keys and shapes are those of LGDLM's model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from job.config import ModelConfig
from job.errors import UserError
from job.model.backbone import build_backbone
from job.model.fast import encode, encode_block
from job.model.groups import Padding, Rows


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
            nn.Linear(latent_dim, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, hidden_size)
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
        self.register_buffer(
            "frequencies", torch.exp(-math.log(longest_period) * torch.arange(half) / half), persistent=False
        )

    def forward(self, t: Tensor) -> Tensor:
        angles = (
            self.scale * t.float()[:, None] * self.frequencies
        )  # float32: bf16 cannot tell neighbouring timesteps apart
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Conditioning(nn.Module):
    """Both timesteps as one vector: [B], [B] -> [B, cond_dim]."""

    def __init__(self, cond_dim: int, scale: float) -> None:
        super().__init__()
        self.text_sigma_map = TimestepEmbedder(cond_dim, scale)
        self.latent_sigma_map = TimestepEmbedder(cond_dim, scale)
        self.combine = nn.Sequential(
            nn.Linear(2 * cond_dim, 4 * cond_dim), nn.SiLU(), nn.Linear(4 * cond_dim, cond_dim)
        )

    def forward(self, text_timesteps: Tensor, latent_timesteps: Tensor) -> Tensor:
        return self.combine(
            torch.cat(
                [F.silu(self.text_sigma_map(text_timesteps)), F.silu(self.latent_sigma_map(latent_timesteps))], dim=-1
            )
        )


class MultimodalMMDiT(nn.Module):
    """Text and latent streams through the mmdit backbone, with a head for each."""

    def __init__(self, config: ModelConfig, vocab_size: int, latent_dim: int) -> None:
        super().__init__()
        self.vocab_size, self.latent_dim, self.max_seq_len = vocab_size, latent_dim, config.max_seq_len
        self.num_residual_streams = config.num_residual_streams
        self.compiled = self.checkpointing = False  # how `encode` runs the blocks
        hidden = config.hidden_size
        self.text_encoder = TextEncoder(vocab_size, hidden, config.max_seq_len)
        self.latent_encoder = LatentEncoder(latent_dim, hidden)
        self.conditioning = Conditioning(config.cond_dim, config.time_scale)
        self.mmdit = build_backbone(config)
        for block in self.mmdit.blocks:  # type: ignore[union-attr]
            block.encode = MethodType(encode_block, block)  # a method, so that FSDP can gather the block for it
        self.text_head = nn.Linear(hidden, vocab_size)
        out = nn.Linear(2 * hidden, latent_dim)
        self.latent_head = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Dropout(config.dropout), out)
        for linear in (self.text_head, out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        text_tokens: Tensor,
        latents: Tensor,
        text_timesteps: Tensor,
        latent_timesteps: Tensor,
        attention_mask: Tensor,
        heads: tuple[str, ...] = ("text", "latent"),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Text logits [B, S, V] and latent prediction [B, D]; None for a head not asked for.

        text_tokens [B, S] int64, latents [B, D], timesteps [B] in [0, 1] (0 clean), attention_mask [B, S] bool (True on real tokens).
        """
        text, latent = self.mmdit(
            modality_tokens=(self.text_encoder(text_tokens), self.latent_encoder(latents)),
            modality_masks=(attention_mask, None),
            time_cond=self.conditioning(text_timesteps, latent_timesteps),
        )
        return (
            self.text_head(text) if "text" in heads else None,
            self.latent_head(latent[:, 0]) if "latent" in heads else None,
        )

    def encode(self, groups: Sequence[Rows], padding: Padding) -> tuple[Tensor, Tensor]:
        """The fast path: see `job.model.fast.encode`."""
        return encode(self, groups, padding)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # hyper-connections chooses its first stream with Python's random
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        yield
    random.setstate(state)


def build_model(config: ModelConfig, vocab_size: int, latent_dim: int, seed: int) -> MultimodalMMDiT:
    """A freshly initialized model, the same for the same seed on every machine; the caller's random state is untouched."""
    with _seeded(seed):
        return MultimodalMMDiT(config, vocab_size, latent_dim)


def vocabulary(config: ModelConfig, data_vocab_size: int) -> int:
    """Rows of the embedding and of the text head: model.vocab_size, or the data's vocabulary rounded up to vocab_multiple.

    Raises UserError when model.vocab_size does not hold the data's token ids.
    """
    if config.vocab_size is None:
        return -(-data_vocab_size // config.vocab_multiple) * config.vocab_multiple
    if config.vocab_size < data_vocab_size:
        raise UserError(
            f"model.vocab_size={config.vocab_size} is below the data's vocabulary of {data_vocab_size}; leave model.vocab_size out"
        )
    return config.vocab_size
