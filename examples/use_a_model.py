# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---
# %% [markdown]
# # A trained model: encode, decode, interpolate, compare
#
# Editors show the parts of this file as cells (VS Code, PyCharm, Jupyter with jupytext), and
# `python examples/use_a_model.py [RUN]` runs them all. It needs a run, such as that of `make train`, and no data.

# %%
import sys
from pathlib import Path

import numpy as np

from job import load

given = [argument for argument in sys.argv[1:] if Path(argument).is_dir()]  # a notebook has arguments of its own
model = load(given[0] if given else "runs/demo")
print(f"{model.step} steps, latents of {model.latent_dim} dimensions, texts of up to {model.max_length} tokens")

# %% [markdown]
# ## Encode
#
# A text's latent, in the units of the encoder that made the training data. The same text always has the same latent.

# %%
texts = ["greek small letter alpha", "greek small letter omega", "latin capital letter b", "latin small letter b"]
latents = model.encode(texts)
print(latents.shape, latents.dtype)

# %% [markdown]
# ## Decode
#
# A latent does not say how many tokens its text has. `round_trip` takes as many as the text had; `decode` takes as many
# as texts with such a latent are likely to have, or what you give.

# %%
for text, back, likely in zip(texts, model.round_trip(texts), model.decode(latents), strict=True):
    print(f"{text!r}\n  round trip      {back!r}\n  likely length   {likely!r}")

# %% [markdown]
# Several candidates, of which the one is kept whose own latent comes nearest, against the likeliest tokens alone:

# %%
lengths = model.token_counts(texts)
greedy = model.decode(latents, lengths, candidates=1, temperature=0.0)
chosen = model.decode(latents, lengths, candidates=16, temperature=0.7, seed=1)
for text, one, best in zip(texts, greedy, chosen, strict=True):
    print(f"{text!r}\n  likeliest       {one!r}\n  best of 16      {best!r}")

# %% [markdown]
# ## Interpolate
#
# Texts on the way from one latent to another. On a straight line those in between would be shorter than any that the
# decoder was trained on; so the direction turns from one to the other, and the length goes with it.


# %%
def between(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """The latent [D] at a share of the way from `start` [D] to `end` [D], on an arc."""
    long, other = np.linalg.norm(start), np.linalg.norm(end)
    angle = np.arccos(np.clip(start @ end / (long * other), -1.0, 1.0))
    if angle < 1e-3:  # nearly the same direction, where a line is as good
        return (1 - share) * start + share * end
    direction = np.sin((1 - share) * angle) * start / long + np.sin(share * angle) * end / other
    return ((1 - share) * long + share * other) * direction / np.sin(angle)


shares = np.linspace(0, 1, 6)
way = np.stack([between(latents[0], latents[2], share) for share in shares])
for share, text in zip(shares, model.decode(way, int(lengths[0])), strict=True):
    print(f"{share:.1f}  {text!r}")

# %% [markdown]
# ## Compare
#
# Which texts does the model hold for alike? And how near do its latents come to the true ones, made by the encoder of
# the training data, which travels with the model?


# %%
def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine of every row of `left` [N, D] with every row of `right` [M, D]: [N, M]."""
    lengths = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
    return left @ right.T / np.maximum(lengths, 1e-12)  # a text of words that the encoder does not know is at zero


alike = cosines(latents, latents)
for row, text in zip(alike, texts, strict=True):
    print("  ".join(f"{value:5.2f}" for value in row), f" {text}")

# %%
true = model.encoder().encode(texts)
for text, own, other in zip(
    texts, np.diag(cosines(latents, true)), cosines(latents, np.roll(true, 1, 0)).diagonal(), strict=True
):
    print(f"{own:5.2f} to its true latent, {other:5.2f} to another text's   {text}")
