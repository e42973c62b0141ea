"""Static models of the model2vec library: a latent is the mean of its text's token vectors, which a model once gave.

Between LSA and a transformer: a table of vectors and a tokenizer, distilled from a sentence encoder
(`model2vec.distill`), so that latents know what words mean, but not their order. It needs neither torch nor a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from job.data.encoder_models import described_model, noted_directory, refuse_other, refuse_wider
from job.data.optional import import_optional
from job.errors import UserError

MODEL2VEC = "model2vec"
# What a tokenizer makes of it tells whether it lowers letters, drops accents, splits words, and does so elsewhere.
PROBE = "The Naïve CAFÉ's  résumé, 12,345 (re-read)\n\t\u4f60\u597d\U0001f600 don't"


class Model2VecEncoder:
    """A static model, by name or directory.

    A text's latent depends on that text alone. One of which the model knows no token has the latent zero.
    """

    def __init__(
        self, model: str, truncate_dim: int | None, *, local_files_only: bool = False, normalize: bool = False
    ) -> None:
        """`normalize` makes all latents of length 1; without it the model decides. UserError where it is not to be had.

        Nothing of a text is cut off, as the library does from its 513th token on of its own accord.
        """
        library = import_optional("model2vec", "model2vec")
        try:
            place = _place(model, local_files_only)
            self.model = library.StaticModel.from_pretrained(place)
            width = self.model.dim
            if truncate_dim and truncate_dim < width:
                self.model = library.StaticModel.from_pretrained(place, dimensionality=truncate_dim)
        except Exception as error:  # the hub's kinds, those of safetensors and tokenizers, and its own
            problem = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(f"--encoder-model {model}: cannot be loaded ({problem})") from error
        refuse_wider(model, truncate_dim, width)
        self.normalize = normalize or bool(self.model.normalize)
        self.description: dict[str, Any] = {
            "name": MODEL2VEC,
            "model": model,
            "truncate_dim": truncate_dim,
            "sha256": self._hash(),
        }
        if normalize:
            self.description["normalize"] = True
        self.description |= noted_directory(model)

    @classmethod
    def load(cls, description: dict[str, Any], local_files_only: bool) -> Model2VecEncoder:
        """The encoder that a description names. UserError if there is another one under its name now."""
        model = described_model(description)
        encoder = cls(
            model,
            description["truncate_dim"],
            local_files_only=local_files_only,
            normalize=description.get("normalize", False),
        )
        refuse_other(encoder.description, description, model)
        return encoder

    def _hash(self) -> str:
        """SHA-256 of the table, of the vocabulary, of what the tokenizer does, and of what is made of the means.

        Not of the tokenizer's file: another version of its library would write it otherwise.
        """
        digest = hashlib.sha256(repr((self.normalize, self.model.tokenize([PROBE]))).encode())
        digest.update("\n".join(self.model.tokens).encode())
        for name in ("embedding", "weights", "token_mapping"):  # the last two are those of a model with a smaller table
            array = getattr(self.model, name)
            if array is not None:
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        if not len(texts):  # which the library refuses
            return np.empty((0, self.model.dim), np.float32)
        latents = self.model.encode(
            list(texts), max_length=None, normalize=self.normalize, use_multiprocessing=False, show_progress_bar=False
        )
        return np.asarray(latents, np.float32)


def _place(model: str, local_files_only: bool) -> str:
    """Where the library is to look: with `local_files_only` the cached files, since it cannot be told to ask nobody."""
    if not local_files_only or Path(model).exists():
        return model
    return str(import_optional("huggingface_hub", "huggingface-hub").snapshot_download(model, local_files_only=True))
