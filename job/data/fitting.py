"""Tokenizer and encoder of a dataset: given, taken from elsewhere, or fitted on those training texts that fit a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np

from job.data import tokenizer as tokenizers
from job.data.console import say
from job.data.encoders import (
    ENCODER_FILE,
    FIT_SAMPLES,
    LSA,
    SENTENCE_TRANSFORMERS,
    WORDS,
    Encoder,
    LsaEncoder,
    Resources,
    SentenceTransformersEncoder,
    load_encoder,
)
from job.data.like import Pattern
from job.data.options import LocalOptions, Options
from job.data.splitting import TRAIN
from job.data.static_encoder import MODEL2VEC, Model2VecEncoder
from job.errors import UserError
from job.files import write_text, write_whole

CHUNK = 4096  # texts encoded at once
# Of the first texts of a split. A few texts may have no word that was seen in training; with more of them the encoder
# does not know what a word of this language is.
LARGEST_SHARE_WITHOUT_LATENT = 0.1
UNKNOWN = {
    LSA: "it tells words by the spaces between them, and these texts have none that it was fitted on (Chinese, "
    "Japanese and Thai are written without spaces); use --encoder sentence_transformers --encoder-model NAME",
    MODEL2VEC: "its model knows no token of these texts; take a model of their language, or another encoder",
}


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """CHUNK texts after another."""
    left = iter(texts)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


def fits(tokens: np.ndarray, max_length: int) -> bool:
    """Whether a text's tokens can be a row."""
    return 0 < len(tokens) <= max_length


class Chosen:
    """Some of the texts: those for which there is a 1. Every loop over them reads the texts anew."""

    def __init__(self, texts: Iterable[str], is_chosen: bytes) -> None:
        self.texts, self.is_chosen = texts, is_chosen

    def __len__(self) -> int:
        return sum(self.is_chosen)

    def __iter__(self) -> Iterator[str]:
        return compress(self.texts, self.is_chosen)


def fitting_texts(tokenizer: tokenizers.TextTokenizer, texts: Iterable[str], max_length: int) -> Chosen:
    """The texts that fit into a row, the first FIT_SAMPLES of them. UserError if there are none."""
    is_fitting = bytearray()
    found = 0
    for chunk in chunks(texts):
        of_chunk = bytes(fits(tokens, max_length) for tokens in tokenizer.encode(chunk))
        is_fitting += of_chunk
        found += sum(of_chunk)
        if found >= FIT_SAMPLES:
            break
    if not found:
        raise UserError(
            f"every text is longer than --max-length {max_length} tokens; raise it, or cut texts with --split-sentences"
        )
    return Chosen(texts, bytes(is_fitting))


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> tuple[tokenizers.TextTokenizer, Chosen]:
    """A tokenizer trained on texts that fit into its rows, of the first FIT_SAMPLES; and these texts.

    How long a text is, only a trained tokenizer tells. So the ones that are too long for it are taken away and another
    one is trained, until it drops none of its own texts: few are left to be dropped after the first time, and it ends
    since the texts only become fewer. Otherwise a file's one line of a megabyte, of which no row is made, would fill
    the vocabulary.
    """
    chosen = Chosen(texts, b"\1" * FIT_SAMPLES)
    while True:
        tokenizer = tokenizers.train(chosen, vocab_size)
        fitting = fitting_texts(tokenizer, chosen, max_length)
        if all(fitting.is_chosen):
            return tokenizer, fitting
        chosen = fitting


class Fitting:
    """How one preparation comes by its tokenizer and its encoder.

    What can be missing is looked for at once, before the texts are read, which may take an hour.
    """

    def __init__(self, options: Options, local: LocalOptions, pattern: Pattern | None, resources: Resources) -> None:
        self.options = options
        self.pattern = pattern
        self.tokenizer: tokenizers.TextTokenizer | None = None
        self.encoder: Encoder | None = None
        self.given: dict[str, Any] | None = None  # description of latents that came with the texts
        if pattern:
            self.tokenizer = pattern.read_tokenizer()
            self.encoder = load_encoder(pattern.directory, pattern.encoder, resources)
            return
        if options.tokenizer != "train":
            self.tokenizer = tokenizers.load(
                str(options.tokenizer),
                local_files_only=local.local_files_only,
                mask_token=options.mask_token,
                pad_token=options.pad_token,
            )
        if options.encoder == SENTENCE_TRANSFORMERS:
            self.encoder = SentenceTransformersEncoder(
                str(options.encoder_model),
                options.truncate_dim,
                str(options.encoder_dtype),
                resources,
                prompt=options.encoder_prompt,
                normalize=bool(options.normalize),
            )
        if options.encoder == MODEL2VEC:
            self.encoder = Model2VecEncoder(
                str(options.encoder_model),
                options.truncate_dim,
                local_files_only=local.local_files_only,
                normalize=bool(options.normalize),
            )

    def fit(self, out: Path, splits: Mapping[str, Iterable[str]]) -> dict[str, Any]:
        """Write tokenizer and encoder into the dataset's directory; returns what the plan says of them."""
        options, texts = self.options, splits[TRAIN]
        tokenizer = self.tokenizer
        if tokenizer is None:
            tokenizer, texts = train_tokenizer(texts, options.vocab_size or 0, options.max_length)
        elif self.encoder is None:
            texts = fitting_texts(tokenizer, texts, options.max_length)
        vocab_size = self.pattern.vocab_size if self.pattern else tokenizer.vocab_size
        say(f"tokenizer of {vocab_size} tokens")
        encoder = self.encoder
        if encoder is None and not self.given:
            encoder = LsaEncoder.fit(texts, options.latent_dim or 0, options.seed, options.lsa_features or WORDS)
            say("encoder fitted")
        if isinstance(encoder, (LsaEncoder, Model2VecEncoder)):
            self._refuse_unknown_texts(tokenizer, encoder, splits)
        if isinstance(encoder, LsaEncoder):
            encoder.save(out / ENCODER_FILE)
        self._write_tokenizer(out / tokenizers.TOKENIZER_FILE, tokenizer)
        return {
            "mask_token_id": tokenizer.mask_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "vocab_size": vocab_size,
            "encoder": self._description(encoder),
        }

    def _description(self, encoder: Encoder | None) -> dict[str, Any]:
        """What dataset.json says of the encoder."""
        if self.pattern:
            return self.pattern.encoder
        if self.given:
            return self.given
        assert encoder
        return encoder.description

    def _write_tokenizer(self, path: Path, tokenizer: tokenizers.TextTokenizer) -> None:
        if self.pattern is None:
            write_text(path, tokenizer.to_json())
        else:  # the same bytes: a model knows its tokenizer by their hash
            content = self.pattern.tokenizer_file.read_bytes()
            write_whole(path, lambda file: file.write(content))

    def _refuse_unknown_texts(
        self, tokenizer: tokenizers.TextTokenizer, encoder: Encoder, splits: Mapping[str, Iterable[str]]
    ) -> None:
        """UserError when the encoder leaves many latents at zero. Looked for here, before an hour of encoding."""
        for split, texts in splits.items():
            first = next(chunks(texts))
            rows = tokenizer.encode(first)
            sample = [text for text, row in zip(first, rows, strict=True) if fits(row, self.options.max_length)]
            if not sample:
                continue
            unknown = int((~encoder.encode(sample).any(axis=1)).sum())
            if unknown > 1 and unknown > LARGEST_SHARE_WITHOUT_LATENT * len(sample):
                name = encoder.description["name"]
                whose = f"the encoder of --like {self.pattern.source}" if self.pattern else f"--encoder {name}"
                raise UserError(
                    f"{whose} leaves {unknown} of {len(sample)} latents of the {split} split at zero: {UNKNOWN[name]}"
                )
