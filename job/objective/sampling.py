"""Making one modality from the other, or both from noise: text by unmasking, latents by DDIM."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from job.config import DecodingConfig
from job.model.groups import Group, Padding
from job.objective.noise import RowNoise
from job.objective.objective import Objective
from job.objective.schedule import LatentSchedule

ONE_PASS = DecodingConfig()
# Distributions over the vocabulary are made for so many tokens at a time: in float32, their sums in float64.
ELEMENTS_AT_A_TIME = 1 << 26


def rows_at_a_time(seq_len: int, vocab_size: int) -> int:
    """How many rows of seq_len tokens are decoded together."""
    return max(1, ELEMENTS_AT_A_TIME // (seq_len * vocab_size))


@torch.no_grad()
def generate(
    objective: Objective,
    mask: Tensor,
    *,
    tokens: Tensor | None = None,
    latent: Tensor | None = None,
    decoding: DecodingConfig = ONE_PASS,
    seed: int = 0,
    numbers: Tensor | None = None,
    first: Choices | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, S] and latents [B, D] for texts of the lengths in mask [B, S] (True on real tokens); what is given is
    kept.

    Given `tokens` are kept but for mask tokens among them, which are filled in. Of `decoding`, `steps` passes are made
    where a text is made, else `latent_steps`. Each pass fills in the positions whose tokens are surest (MaskGIT, Chang
    et al. 2022) and moves the latent along the deterministic path (DDIM, Song et al. 2021). One pass is what l2t, t2l
    and cycle_vae train by default; more need a model that was trained on partly noisy input
    (loss.text_t_mode=random, loss.latent_t_mode=random, or unconditional steps).

    A row's noise is drawn by the seed and its number in `numbers` [B]; None counts the rows from 0. The first pass
    depends on no draw where the latent is given: who makes several texts of one latent makes that pass once, and hands
    in what each of them chose, `first` of `first_choices`.

    Where the model's probabilities are not finite the mask token stays, which is never decoded otherwise.
    """
    device, rows = mask.device, len(mask)
    model = objective.model
    # Drawn on the CPU, the same for every device.
    noise = RowNoise(seed, torch.arange(rows) if numbers is None else numbers)
    padding = Padding(mask, keep=False, lengths=mask.sum(1).tolist())
    draft = Draft.of(masked(objective, mask) if tokens is None else tokens, mask, objective.mask_token_id)
    z = noise.normal("sample_latent", model.latent_dim).to(device) if latent is None else latent
    wanted = {"text": tokens is None or bool(draft.holes.any()), "latent": latent is None}
    heads = tuple(head for head, is_wanted in wanted.items() if is_wanted)
    steps = decoding.steps if wanted["text"] else decoding.latent_steps
    for step in range(steps if heads else 0):
        now, after = (torch.full((1,), 1 - k / steps, dtype=torch.float32, device=device) for k in (step, step + 1))
        text_t, latent_t = (now if wanted[head] else torch.zeros_like(now) for head in ("text", "latent"))
        # The timestep of a text is the share of it that is masked, which is less where a part of it was given.
        text_t = text_t if tokens is None else text_t * draft.share
        choices = first if step == 0 else None
        if choices is None:
            encoded = model.encode([Group(draft.words, z, text_t, latent_t, heads)], padding)
            if wanted["latent"]:
                z = ddim_step(objective.schedule, z, now.expand(rows), after.expand(rows), encoded.latent)
            if wanted["text"]:
                logits = text_logits(objective, encoded.text, padding)
                uniform = noise.uniform(f"sample_text_{step}", mask.shape[1])
                choices = Choices(*(chosen[0] for chosen in choose(logits, decoding, uniform[None])))
        if choices is not None:
            draft = draft.filled(choices, (steps - step - 1) / steps, decoding.remasking)
    return draft.words, z


def masked(objective: Objective, mask: Tensor) -> Tensor:
    """Fully masked texts [B, S] of the lengths in mask [B, S]."""
    return torch.where(mask, objective.mask_token_id, 0)


class Choices(NamedTuple):
    """Tokens that a pass chose for places of a text."""

    tokens: Tensor  # [..., B, S] int64
    confidence: Tensor  # [..., B, S] their log-probabilities; NaN where there are none to choose by


@torch.no_grad()
def first_choices(
    objective: Objective,
    mask: Tensor,
    tokens: Tensor,
    latent: Tensor,
    ways: Sequence[DecodingConfig],
    seeds: Sequence[int],
    numbers: Tensor,
) -> list[Choices]:
    """What the first pass of `generate` chooses in each of several ways with its seed, from one pass of the model.

    The ways differ in their temperature alone: neighbours that do not are drawn together.
    """
    draft = Draft.of(tokens, mask, objective.mask_token_id)
    padding = Padding(mask, keep=False, lengths=mask.sum(1).tolist())
    clean = torch.zeros(1, dtype=torch.float32, device=mask.device)
    encoded = objective.model.encode([Group(tokens, latent, draft.share, clean, ("text",))], padding)
    logits = text_logits(objective, encoded.text, padding)
    uniform = torch.stack([RowNoise(seed, numbers).uniform("sample_text_0", mask.shape[1]) for seed in seeds])
    chosen: list[Choices] = []
    for way, alike in itertools.groupby(ways):
        draws = uniform[len(chosen) : len(chosen) + len(list(alike))]
        chosen += [Choices(*each) for each in zip(*choose(logits, way, draws), strict=True)]
    return chosen


def text_logits(objective: Objective, encoded: Tensor, padding: Padding) -> Tensor:
    """Logits [B, S, V] in float32, -inf for tokens that are never decoded."""
    logits = objective.model.logits(encoded, padding).float()
    logits[..., objective.never_decoded] = -torch.inf
    return logits


@dataclass(frozen=True)
class Draft:
    """Texts in the making."""

    words: Tensor  # [B, S], the mask token in holes
    holes: Tensor  # [B, S] bool: places that are yet to be filled
    confidence: Tensor  # [B, S] log-probability of each token when it was filled in; inf where nothing is to be done
    size: Tensor  # [B] float32: holes at the beginning
    share: Tensor  # [B]: the same as a share of the text
    mask_token_id: int

    @classmethod
    def of(cls, words: Tensor, mask: Tensor, mask_token_id: int) -> Draft:
        """Texts [B, S] whose holes are the mask tokens; mask [B, S] is True on real tokens."""
        holes = (words == mask_token_id) & mask
        size = holes.sum(1)
        confidence = torch.full(words.shape, torch.inf, dtype=torch.float32, device=words.device)
        return cls(words, holes, confidence, size.float(), size.float() / mask.sum(1), mask_token_id)

    def filled(self, choices: Choices, left: float, remasking: float) -> Draft:
        """The texts after a pass that made choices [B, S].

        Of the holes at the beginning the share `left` remains: the least sure ones. Among them are up to the share
        `remasking` of the tokens that earlier passes filled in, masked again so that they can be chosen anew, given all
        others: ReMDM (Wang et al. 2025), whose sigma is here min(remasking, left / filled), and which masks again by
        confidence. What was given is never masked.
        """
        # Rounded before it is cut: 1 - k / steps is not exact, and 0.6 of 5 must be 3.
        remaining = torch.floor((self.size * left).double() + 1e-6).long()
        again = torch.minimum(torch.floor((self.size - self.holes.sum(1)) * remasking + 1e-6).long(), remaining)
        earlier = self.confidence.isfinite() & ~self.holes
        masked_again = earlier & (_rank(self.confidence.masked_fill(~earlier, torch.inf)) < again[:, None])
        kept_open = _rank(choices.confidence.masked_fill(~self.holes, torch.inf)) < (remaining - again)[:, None]
        now = self.holes & ~kept_open
        holes = (self.holes & kept_open) | masked_again
        # So that whoever reads the texts, which is later than here, sees it without asking the device once more.
        undecided = now & choices.confidence.isnan()
        words = torch.where(now, choices.tokens, self.words)
        words = words.masked_fill(masked_again | undecided, self.mask_token_id)
        sure = torch.where(now, choices.confidence, self.confidence)
        return Draft(words, holes, sure, self.size, self.share, self.mask_token_id)


def _rank(values: Tensor) -> Tensor:
    """The place of each value in its row [B, S] from the smallest, which has 0."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)


def choose(logits: Tensor, decoding: DecodingConfig, uniform: Tensor) -> Choices:
    """Tokens [N, B, S] by logits [B, S, V] and N draws [N, B, S] in [0, 1), with their log-probabilities.

    Temperature 0 takes the likeliest, else tokens are drawn from softmax(logits / temperature), of whose likeliest
    tokens as many are left as make up `top_p` (nucleus sampling, Holtzman et al. 2020).
    """
    if decoding.temperature:
        probability = (logits / decoding.temperature).softmax(-1)
        if decoding.top_p < 1:
            probability = nucleus(probability, decoding.top_p)
        tokens = drawn(probability, uniform.to(logits.device))
    else:
        tokens = logits.argmax(-1).expand(uniform.shape)
    # No sum of probabilities that are not finite exceeds a draw: the place behind the last token, where a GPU would
    # end the whole process.
    last = logits.shape[-1] - 1
    nowhere, tokens = tokens > last, tokens.clamp(max=last)
    by_place = logits.log_softmax(-1).gather(-1, tokens.movedim(0, -1))
    return Choices(tokens, by_place.movedim(-1, 0).masked_fill(nowhere, torch.nan))


def nucleus(probability: Tensor, top_p: float) -> Tensor:
    """Probabilities [..., V] with 0 for all but the likeliest tokens that together have the probability top_p."""
    ordered, order = probability.sort(-1, descending=True)
    surplus = ordered.cumsum(-1) - ordered >= top_p  # the likelier ones have it already
    return probability.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), 0)


def drawn(probability: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [N, ...] drawn from probabilities [..., V], which need not sum to 1, by N draws [N, ...] in [0, 1).

    The token is the first at which the sum of probabilities exceeds the draw, so one of probability 0 is never taken;
    it is V where a probability is not finite.
    In float64, since rounding in sums over a large vocabulary would favour some tokens.
    """
    sums = probability.double().cumsum(-1)
    thresholds = (uniform.double().movedim(0, -1) * sums[..., -1:]).contiguous()
    return torch.searchsorted(sums, thresholds, right=True).movedim(-1, 0)


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
