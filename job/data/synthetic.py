"""Random samples that need no data and can still be learned."""

from __future__ import annotations

import hashlib

import numpy as np

from job.data.shards import SPLITS, DatasetInfo, Split

PAD, MASK, FIRST_WORD = 0, 1, 2
THEME_SIZE = 4  # distinct words of a sample
STATISTICS_SAMPLES = 256


class SyntheticDataset:
    """Each sample draws its tokens from a few words of its own; its latent is a fixed random projection of their mean,
    so that the latent tells which words are likely and the words tell the latent. Every sample is a function of (seed,
    split, index).
    """

    def __init__(
        self, num_samples: int, vocab_size: int, latent_dim: int, max_length: int, seed: int, split: Split
    ) -> None:
        self.num_samples, self.seed, self.split = num_samples, seed, split
        self.vocab_size, self.max_length = vocab_size, max_length
        self.projection = (
            np.random.default_rng([seed, len(SPLITS)]).standard_normal((vocab_size, latent_dim)).astype(np.float32)
        )
        train = [self._sample(0, index) for index in range(STATISTICS_SAMPLES)]
        latents = np.stack([latent for _, latent in train])
        self.info = DatasetInfo(
            vocab_size=vocab_size,
            latent_dim=latent_dim,
            max_length=max_length,
            mask_token_id=MASK,
            pad_token_id=PAD,
            counts={split: num_samples},
            shards={},
            latent_mean=latents.mean(0).tolist(),
            latent_std=latents.std(0).tolist(),
            token_counts=np.bincount(np.concatenate([tokens for tokens, _ in train]), minlength=vocab_size).tolist(),
            encoder={"name": "synthetic"},
            tokenizer=None,
            files={},
            options={"seed": seed},
            generated_by="synthetic",
        )
        parameters = ["synthetic", num_samples, vocab_size, latent_dim, max_length, seed, split]
        self.fingerprint = hashlib.sha256(repr(parameters).encode()).hexdigest()

    def __len__(self) -> int:
        return self.num_samples

    def _length(self, rng: np.random.Generator) -> int:
        return int(rng.integers(max(1, self.max_length // 2), self.max_length + 1))

    def _sample(self, split_number: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, split_number, index])
        length = self._length(rng)
        theme = rng.choice(np.arange(FIRST_WORD, self.vocab_size), size=THEME_SIZE, replace=False)
        tokens = rng.choice(theme, size=length)
        return tokens, self.projection[tokens].mean(0)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Token counts of these samples, int64."""
        split_number = SPLITS.index(self.split)
        return np.array(
            [self._length(np.random.default_rng([self.seed, split_number, int(index)])) for index in indices], np.int64
        )

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [L] and latent float32 [D]."""
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        return self._sample(SPLITS.index(self.split), index)
