"""Texts from latents and latents from texts, and what only a model of both directions can do: check one by the other.

A latent has many plausible texts. Encoded by the same model, a text that was decoded tells how near it comes to the
latent that was wanted. So of several candidates the nearest is kept, and tokens that keep a text away are decoded anew
(vec2text, Morris et al. 2023, corrects texts by re-encoding them, too).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from job.config import DecodingConfig
from job.objective.noise import seed_for
from job.objective.objective import Objective
from job.objective.sampling import ONE_PASS, Choices, first_choices, generate, masked, rows_at_a_time


def encode(
    objective: Objective, tokens: Tensor, mask: Tensor, decoding: DecodingConfig = ONE_PASS, seed: int = 0
) -> Tensor:
    """T2L: standardized latents [B, D] predicted from tokens [B, S].

    All rows start from the same noise. So a text has one latent, whatever its place among others.
    """
    same = torch.zeros(len(mask), dtype=torch.int64)
    return generate(objective, mask, tokens=tokens, decoding=decoding, seed=seed, numbers=same)[1]


def decode(
    objective: Objective,
    latent: Tensor,
    mask: Tensor,
    decoding: DecodingConfig = ONE_PASS,
    seed: int = 0,
    numbers: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """L2T: tokens [B, S] from standardized latents [B, D], of the lengths in mask [B, S].

    `tokens` [B, S] are kept where they are not the mask token. Of decoding.candidates texts the one is taken whose
    latent, encoded by the same model, is nearest to the wanted one; the first of them is of the likeliest tokens, the
    others are drawn with decoding.temperature. decoding.corrections then go on from there. A row's draws depend on the
    seed and its number in `numbers` [B] (None: 0, 1, ...).
    """
    numbers = torch.arange(len(mask)) if numbers is None else numbers
    given = masked(objective, mask) if tokens is None else tokens
    rows = rows_at_a_time(mask.shape[1], objective.model.vocab_size)
    made: list[Tensor] = []
    for start in range(0, len(mask), rows):
        part = slice(start, start + rows)
        made.append(_decode(objective, latent[part], mask[part], given[part], numbers[part], decoding, seed))
    return torch.cat(made)


def _decode(
    objective: Objective,
    latent: Tensor,
    mask: Tensor,
    given: Tensor,
    numbers: Tensor,
    decoding: DecodingConfig,
    seed: int,
) -> Tensor:
    """`decode` of rows whose logits fit into memory."""
    if decoding.candidates == 1 and decoding.corrections == 0:
        return generate(objective, mask, tokens=given, latent=latent, decoding=decoding, seed=seed, numbers=numbers)[0]
    maker = _Maker(objective, latent, mask, decoding, seed, numbers)
    best = maker.nearest_of_candidates(given)
    return _corrected(maker, best, given == objective.mask_token_id).words


@dataclass(frozen=True)
class _Nearest:
    """The best texts so far."""

    words: Tensor  # [B, S]
    distance: Tensor  # [B], of their latents to the wanted ones

    def or_nearer(self, other: _Nearest) -> _Nearest:
        """Row by row the nearer of two."""
        nearer = other.distance < self.distance
        words = torch.where(nearer[:, None], other.words, self.words)
        return _Nearest(words, torch.where(nearer, other.distance, self.distance))


@dataclass(frozen=True)
class _Maker:
    """Texts for given latents, and how near they come."""

    objective: Objective
    latent: Tensor  # [B, D]
    mask: Tensor  # [B, S]
    decoding: DecodingConfig
    seed: int
    numbers: Tensor

    def texts(self, tokens: Tensor, purpose: str) -> Tensor:
        """decoding.candidates texts [N, B, S] in the holes of tokens [B, S].

        Of several the first is of the likeliest tokens, the others are drawn.
        """
        ways = [self.decoding] * self.decoding.candidates
        if len(ways) > 1:
            ways[0] = dataclasses.replace(self.decoding, temperature=0.0)
        seeds = [self._seed(purpose, number) for number in range(len(ways))]
        first = first_choices(self.objective, self.mask, tokens, self.latent, ways, seeds, self.numbers)
        made = [self._text(tokens, *each) for each in zip(ways, seeds, first, strict=True)]
        return torch.stack(made)

    def _seed(self, purpose: str, number: int) -> int:
        """The first candidate has the draws that a single text has."""
        return self.seed if (purpose, number) == ("candidate", 0) else seed_for(purpose, number, self.seed)

    def _text(self, tokens: Tensor, decoding: DecodingConfig, seed: int, first: Choices) -> Tensor:
        return generate(
            self.objective,
            self.mask,
            tokens=tokens,
            latent=self.latent,
            decoding=decoding,
            seed=seed,
            numbers=self.numbers,
            first=first,
        )[0]

    def distance(self, words: Tensor, mask: Tensor) -> Tensor:
        """Mean squared distance [B] of the latents of texts [B, S] to the wanted ones."""
        return self.distances(words[None], mask)[0]

    def distances(self, words: Tensor, mask: Tensor) -> Tensor:
        """The same [N, B] of N texts [N, B, S] for each latent.

        Draws repeat themselves where the model is sure, so a text is encoded once however often it was drawn.
        """
        count, rows, _ = words.shape
        row = torch.arange(rows, device=words.device).expand(count, rows)
        different, which = torch.cat([row[..., None], words], 2).flatten(0, 1).unique(dim=0, return_inverse=True)
        found = []
        for texts in different.split(rows):
            row, tokens = texts[:, 0], texts[:, 1:]
            predicted = encode(self.objective, tokens, mask[row], self.decoding, self.seed)
            found.append((predicted - self.latent[row]).square().mean(1))
        return torch.cat(found)[which].view(count, rows)

    def nearest_of_candidates(self, tokens: Tensor, purpose: str = "candidate") -> _Nearest:
        """The nearest of decoding.candidates texts in the holes of tokens [B, S], the earliest of equally near ones."""
        words = self.texts(tokens, purpose)
        distances = self.distances(words, self.mask)
        best = _Nearest(words[0], distances[0])
        for number in range(1, len(words)):
            best = best.or_nearer(_Nearest(words[number], distances[number]))
        return best

    def distance_without_each(self, words: Tensor) -> Tensor:
        """Distances [B, S] of the texts with one token left out, each in turn; inf on padding.

        Left out, not masked: T2L has only seen clean texts, and a text that is a token shorter is one.
        """
        lengths, places = self.mask.sum(1), torch.arange(words.shape[1], device=words.device)
        distances = torch.full(words.shape, torch.inf, dtype=torch.float32, device=words.device)
        shorter = places[:-1] < (lengths - 1).clamp(min=1)[:, None]
        for place in range(int(lengths.max())):
            kept = places[:-1] + (places[:-1] >= place)
            without = self.distance(words[:, kept], shorter)
            distances[:, place] = torch.where(place < lengths, without, torch.inf)
        return distances


def _corrected(maker: _Maker, best: _Nearest, free: Tensor) -> _Nearest:
    """The texts after decoding.corrections rounds; only `free` [B, S] places change.

    A round masks tokens that hurt: those without which the text's latent would be nearer to the wanted one. They are
    decoded anew, given the others, and kept if that brings the text nearer. Where it does not, the next round takes one
    token alone, the next in order of how much it hurts.
    """
    objective, mask = maker.objective, maker.mask
    if mask.shape[1] < 2:
        return best  # nothing is left of a text of one token without it
    movable = free & mask
    failed = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)  # rounds since the text changed
    without = best.distance[:, None]
    for number in range(maker.decoding.corrections):
        if number == 0 or bool((failed == 0).any()):
            without = maker.distance_without_each(best.words).masked_fill(~movable, torch.inf)
        order = without.argsort(1).argsort(1)  # 0: hurts most
        all_that_hurt = (without < best.distance[:, None]) | (order == 0)
        one = order == ((failed - 1) % movable.sum(1).clamp(min=1))[:, None]
        holes = torch.where((failed == 0)[:, None], all_that_hurt, one) & movable
        tried = maker.nearest_of_candidates(
            best.words.masked_fill(holes, objective.mask_token_id), f"correction_{number}"
        )
        failed = torch.where(tried.distance < best.distance, 0, failed + 1)
        best = best.or_nearer(tried)
    return best
