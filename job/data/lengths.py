"""How long a text is likely to be, from its latent.

A model here decodes a text of a given number of tokens: it has no token that ends a text. Where nobody gives a number,
it is predicted by a ridge regression of the logarithm of the length on the latent, fitted on training rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LENGTH_SAMPLES = 4096  # training rows to fit on, the first ones: prepared rows come in the order of their texts' hashes
PENALTY = 1e-2  # of the squared weights, per sample, for inputs of unit variance


def fit_lengths(latents: np.ndarray, lengths: np.ndarray) -> list[float]:
    """Weights [D + 1] for `predicted_lengths`, the last one a constant, from raw latents [N, D] and token counts [N].

    Latents that are not finite are left out; without any others the weights are empty.
    """
    finite = np.isfinite(latents).all(1)
    x, y = latents[finite].astype(np.float64), np.log(lengths[finite])
    if not len(x):
        return []
    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1  # a constant dimension tells nothing, and gets weight zero
    x = (x - mean) / std
    scaled = np.linalg.solve(x.T @ x + PENALTY * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    weights = scaled / std
    return [*weights.tolist(), float(y.mean() - mean @ weights)]


def predicted_lengths(weights: Sequence[float], latents: np.ndarray, longest: int) -> np.ndarray:
    """Likely token counts, int64 [N] in [1, longest], of the texts of raw latents [N, D]."""
    *slope, constant = weights
    logarithms = latents.astype(np.float64) @ np.array(slope) + constant
    # Clipped before the exponential, which overflows for a latent far from all that was trained.
    return np.exp(np.clip(logarithms, 0, np.log(longest))).round().astype(np.int64)
