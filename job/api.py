"""A trained model for programs: texts to latents and back.

    from job import load

    model = load("runs/demo")                        # a run, one of its checkpoints, or an exported directory
    latents = model.encode(["The first text.", "Another one."])       # float32 [2, D]
    texts = model.decode(latents)                                     # two texts

Latents go in and come out in the units of the encoder that made the training data: the model's own statistics are
applied inside. Nothing else is needed: no configuration files, no data, no process group.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import einx  # noqa: F401  # before torch: job.model.backbone says why
import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from job.api_inputs import counts_of_tokens, list_of_texts, raw_latents, real_number, token_ids, whole_number
from job.config import Config, DecodingConfig
from job.config_checks import check_decoding
from job.data.description import ModelDescription, find_file
from job.data.encoders import ENCODER_FILE, Encoder, load_encoder
from job.data.lengths import predicted_lengths
from job.data.loader import scale_of
from job.data.tokenizer import TextTokenizer
from job.errors import UserError, first_line
from job.objective.cycle_decoding import decode, encode
from job.round_trips import length_mask, padded
from job.runtime.precision import autocast
from job.trained import Trained, choose_device, load_trained


class DecodingWarning(UserWarning):
    """A way of decoding that the model was not trained for."""


class DecodingOptions(TypedDict, total=False):
    """How texts and latents are made. What is left out is as the run's configuration says in its section `decoding`."""

    steps: int  # passes over a text: each keeps the surest tokens
    latent_steps: int  # passes over a latent that is predicted from a text
    temperature: float  # 0 takes the likeliest tokens, 1 draws them by their probabilities
    top_p: float  # draw among the likeliest tokens that have this probability together
    remasking: float  # share of the tokens so far that a pass masks again
    candidates: int  # texts decoded of a latent; kept is the one whose own latent is nearest to it
    corrections: int  # rounds of decoding anew the tokens that keep a text from its latent


DTYPES = ("auto", "bf16", "fp32")
Lengths = int | Sequence[int] | np.ndarray | None


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | None = None,
    average: bool | None = None,
    data: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Model:
    """The model of a run directory, of one of its checkpoints, or of an exported directory.

    device: "auto" takes a GPU where there is one; or what torch.device takes: "cpu", "cuda", "cuda:1".
    dtype: "auto" (bf16 on GPUs that have it), "bf16" or "fp32" to compute in; None: as the model was trained.
    average: the moving average of the weights; None: where there is one.
    data: the prepared data of a run from before runs carried their tokenizer and statistics, or its URL.
    cache_dir: where data of a URL is copied to, once; None: where the run did.

    Raises UserError (job.errors), whose text is one line, for a path without a model or files that are damaged.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if device in ("auto", "cpu", "cuda"):
        place = choose_device(str(device))
    else:
        try:
            place = torch.device(device)
            torch.empty(0, device=place)  # whether it is there
        except (AssertionError, RuntimeError, TypeError) as error:
            raise UserError(f"device {str(device)!r}: {first_line(error)}") from error
    cache = Path(cache_dir) if cache_dir is not None else None
    trained = load_trained(Path(path), data, average, cache)
    return Model(trained, place, dtype or trained.config.training.dtype)


class Model:
    """A trained model on a device.

    Every method takes any number of inputs and computes them in batches. A result depends on its own input and on
    `seed` only, not on what else is in the call (but for the last bits, which differ between batches).
    """

    def __init__(self, trained: Trained, device: torch.device, dtype: str) -> None:
        """Move weights that were read to a device; programs call `load` instead."""
        self.trained, self.device, self.dtype = trained, device, dtype
        self.objective = trained.objective(device)

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.trained.config

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen."""
        return self.trained.step

    @property
    def description(self) -> ModelDescription:
        """What the model knows of its data: statistics, special tokens, encoder."""
        return self.trained.description

    @property
    def latent_dim(self) -> int:
        """D, the dimension of the latents."""
        return self.trained.latent_dim

    @property
    def max_length(self) -> int:
        """The most tokens that a text may have."""
        return self.objective.max_seq_len

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer. UserError when the model came without one."""
        if self.trained.tokenizer is None:
            reason = "the data came without one; use encode_ids and decode_ids, or convert the data with --tokenizer"
            if self.description.tokenizer:
                reason = (
                    f"{self.description.tokenizer} is not beside it, or not the same any more; "
                    "name the run's data with --data DIR"
                )
            raise UserError(f"{self.trained.path}: texts need a tokenizer, and {reason}")
        return self.trained.tokenizer

    # Texts to latents.

    def encode(
        self,
        texts: Sequence[str],
        *,
        truncate: bool = False,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = False,
    ) -> np.ndarray:
        """Latents, float32 [N, D] in the encoder's own units, predicted from texts (T2L).

        A prediction starts from noise, which is the same for every text and drawn by `seed`. `steps` is the number of
        passes (None: the run's decoding.latent_steps); more than one need a model that was trained with
        loss.latent_t_mode=random. `truncate` cuts texts of more than `max_length` tokens. `progress` draws a bar on
        standard error.

        UserError for an empty text, one that is too long, an option that cannot be, or a model without a tokenizer.
        """
        rows = self._rows(texts, truncate)
        return self.encode_ids(rows, steps=steps, seed=seed, batch_size=batch_size, progress=progress)

    def encode_ids(
        self,
        rows: Sequence[np.ndarray],
        *,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = False,
    ) -> np.ndarray:
        """`encode` of token ids, int [L] each."""
        rows = token_ids(rows, self.max_length, self.trained.vocab_size)
        decoding = self._decoding({} if steps is None else {"latent_steps": whole_number("steps", steps, 1)})
        seed = whole_number("seed", seed)
        latents = np.empty((len(rows), self.latent_dim), np.float32)

        def encode_batch(chosen: np.ndarray) -> None:
            tokens, mask = padded([rows[index] for index in chosen], self.device)
            latents[chosen] = encode(self.objective, tokens, mask, decoding, seed).float().cpu()

        self._in_batches([len(row) for row in rows], encode_batch, batch_size, "encode" if progress else None)
        broken = np.flatnonzero(~np.isfinite(latents).all(1))
        if len(broken):
            where = f"{self.trained.path}: the latent of text {broken[0] + 1}"
            raise UserError(f"{where} is not finite: the run diverged, or its weights are damaged")
        scale = scale_of(self.description)
        return latents if scale is None else scale.raw(torch.from_numpy(latents)).numpy()

    # Latents to texts.

    def decode(
        self,
        latents: ArrayLike,
        lengths: Lengths = None,
        *,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = False,
        **options: Unpack[DecodingOptions],
    ) -> list[str]:
        """Texts decoded (L2T) from latents [N, D] in the encoder's own units.

        The model does not choose how long a text is. `lengths` gives the tokens of each text, or one number for all.
        None: as long as texts with such a latent are likely to be, by a regression of the lengths on the latents that
        was fitted when training began (`likely_lengths`).

        DecodingOptions say how: for instance steps=4, or temperature=0.7 with candidates=8. Draws are made by `seed`
        and the latent's place in the call. UserError for latents of another width or that are not finite, for an option
        that cannot be, and where the model's probabilities are not finite.
        """
        rows = self.decode_ids(latents, lengths, seed=seed, batch_size=batch_size, progress=progress, **options)
        return [self.tokenizer.decode(row) for row in rows]

    def decode_ids(
        self,
        latents: ArrayLike,
        lengths: Lengths = None,
        *,
        template: Sequence[np.ndarray] | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = False,
        **options: Unpack[DecodingOptions],
    ) -> list[np.ndarray]:
        """`decode` to token ids, int64 [L] each; needs no tokenizer.

        With `template`, token ids int [L] for each latent, what is not the mask token there is kept, and lengths are
        those of the template's rows.
        """
        decoding, seed = self._decoding(options), whole_number("seed", seed)
        if template is not None and lengths is not None:
            raise UserError("a template says how long its texts are; leave lengths out")
        if template is not None:
            template = token_ids(template, self.max_length, self.trained.vocab_size)
            lengths = [len(row) for row in template]
        raw = raw_latents(latents, self.latent_dim)
        if lengths is None:
            counts = self.likely_lengths(raw)
        else:
            counts = counts_of_tokens(lengths, len(raw), self.max_length)
        scale = scale_of(self.description)
        z = torch.from_numpy(raw) if scale is None else scale.standardized(torch.from_numpy(raw))
        rows: list[np.ndarray] = [np.empty(0, np.int64)] * len(raw)

        def decode_batch(chosen: np.ndarray) -> None:
            numbers = torch.from_numpy(chosen)
            mask = length_mask(torch.from_numpy(counts[chosen])).to(self.device)
            given = None if template is None else padded([template[index] for index in chosen], self.device)[0]
            made = decode(self.objective, z[numbers].to(self.device), mask, decoding, seed, numbers, given)
            for index, row in zip(chosen, made.cpu().numpy(), strict=True):
                rows[index] = row[: counts[index]]

        self._in_batches(counts.tolist(), decode_batch, batch_size, "decode" if progress else None)
        # The mask token is never decoded, so it stands where there was nothing to decode by.
        broken = [index for index, row in enumerate(rows) if self.description.mask_token_id in row]
        if broken:
            raise UserError(
                f"{self.trained.path}: latent {broken[0] + 1} cannot be decoded: the probabilities of its tokens are "
                "not finite; it, or 1 / temperature, is far too large, or the run diverged or its weights are damaged"
            )
        return rows

    def likely_lengths(self, latents: ArrayLike) -> np.ndarray:
        """Likely token counts, int64 [N], of the texts that belong to latents [N, D] in the encoder's own units.

        UserError for a model from before models carried what this needs.
        """
        if not self.description.length_weights:
            raise UserError(
                f"{self.trained.path}: this model does not know how long texts are; give lengths, "
                "or export it again from its run"
            )
        longest = min(self.max_length, self.description.max_length)
        return predicted_lengths(self.description.length_weights, raw_latents(latents, self.latent_dim), longest)

    # Both.

    def round_trip(
        self,
        texts: Sequence[str],
        *,
        truncate: bool = False,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = False,
        **options: Unpack[DecodingOptions],
    ) -> list[str]:
        """Texts decoded from the latents predicted from texts (T2L2T), each with as many tokens as it had."""
        rows = self._rows(texts, truncate)
        steps = options.get("latent_steps")
        latents = self.encode_ids(rows, steps=steps, seed=seed, batch_size=batch_size, progress=progress)
        lengths = [len(row) for row in rows]
        return self.decode(latents, lengths, seed=seed, batch_size=batch_size, progress=progress, **options)

    def encoder(self) -> Encoder:
        """The encoder that made the training data: its `encode(texts)` gives true latents, which `decode` takes.

        UserError when it is not at hand: not carried by data from before data had it, or a library is not installed.
        """
        name = ENCODER_FILE
        listed = self.description.files.get(name)
        found = find_file(name, listed, self.trained.directories) if listed else None
        return load_encoder(found.parent if found else self.trained.path, self.description.encoder)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self.tokenizer.encode(list_of_texts(texts))]

    # What the methods share.

    def _rows(self, texts: Sequence[str], truncate: bool) -> list[np.ndarray]:
        """Token ids of texts. UserError for an empty text, and for one that is too long."""
        texts = list_of_texts(texts)
        rows = self.tokenizer.encode(texts)
        if truncate:
            rows = [row[: self.max_length] for row in rows]
        bad = [number for number, row in enumerate(rows) if not 0 < len(row) <= self.max_length]
        if bad:
            first = bad[0]
            more = f" ({len(bad) - 1} more such texts)" if len(bad) > 1 else ""
            raise UserError(
                f"text {first + 1}, {texts[first][:40]!r}: {len(rows[first])} tokens; "
                f"this model takes 1 to {self.max_length}{more}"
            )
        return rows

    def _decoding(self, options: DecodingOptions) -> DecodingConfig:
        """How to decode: the run's configuration, but for the options given. UserError for one that cannot be.

        Warns (DecodingWarning) of passes that the model was not trained for.
        """
        defaults = dataclasses.asdict(DecodingConfig())
        given: dict[str, Any] = {}
        for name, value in options.items():
            if name not in defaults:
                raise UserError(f"{name}: no such option; choose among {', '.join(defaults)}")
            checked = whole_number if isinstance(defaults[name], int) else real_number
            given[name] = checked(name, value)
        decoding = dataclasses.replace(self.config.decoding, **given)
        for warning in check_decoding(self.config, decoding):
            warnings.warn(warning, DecodingWarning, stacklevel=4)
        return decoding

    def _in_batches(
        self, lengths: Sequence[int], compute: Callable[[np.ndarray], None], batch_size: int, bar: str | None
    ) -> None:
        """Call `compute` with the places [B] of a batch at a time, rows of similar lengths together."""
        batch_size = whole_number("batch_size", batch_size, 1)
        # The longest first, so that a batch which does not fit into memory is met at once.
        order = np.argsort(-np.array(lengths, np.int64), kind="stable")
        with autocast(self.dtype, self.device), tqdm(desc=bar, total=len(order), disable=bar is None) as shown:
            for chosen in _chunks(order, batch_size):
                compute(chosen)
                shown.update(len(chosen))


def _chunks(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
