"""Text encoders: one latent per text."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from job.errors import UserError

MAX_FEATURES = 50_000
FIT_SAMPLES = 1_000_000  # texts in hash order, so any prefix is a random sample


class Encoder(Protocol):
    """Latents of texts."""

    description: dict[str, Any]  # what dataset.json says of it

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        ...


class LsaEncoder:
    """TF-IDF of words and a truncated SVD."""

    def __init__(self, pipeline: Any, description: dict[str, Any]) -> None:
        self.pipeline, self.description = pipeline, description

    @classmethod
    def fit(cls, texts: Sequence[str], latent_dim: int, seed: int) -> LsaEncoder:
        """Fit on the training texts. UserError if they have fewer different words than dimensions."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline

        tfidf = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", max_features=MAX_FEATURES)
        svd = TruncatedSVD(latent_dim, random_state=seed)
        # One thread: the order of sums, and with it the last bits, must not depend on the machine's cores or on torchrun.
        with threadpool_limits(1):
            try:
                features = tfidf.fit_transform(texts[:FIT_SAMPLES])
                if min(features.shape) <= latent_dim:
                    raise UserError(
                        f"--latent-dim {latent_dim}: the training split has only {features.shape[0]} texts with {features.shape[1]} different "
                        "words; give more texts or fewer dimensions"
                    )
                svd.fit(features)
            except ValueError as error:
                raise UserError(f"--encoder lsa: the texts cannot be used ({error})") from error
        return cls(
            make_pipeline(tfidf, svd),
            {
                "name": "lsa",
                "vocabulary": features.shape[1],
                "explained_variance": round(float(svd.explained_variance_ratio_.sum()), 4),
            },
        )

    def save(self, file: Any) -> None:
        """Write for `load`: a working file of one command, never part of a dataset."""
        pickle.dump((self.pipeline, self.description), file)

    @classmethod
    def load(cls, path: Path) -> LsaEncoder:
        """Read what `save` wrote."""
        return cls(*pickle.loads(path.read_bytes()))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        with threadpool_limits(1):
            return np.asarray(self.pipeline.transform(texts), np.float32)


class SentenceTransformersEncoder:
    """Any model of the sentence-transformers library, by name or directory."""

    def __init__(
        self,
        model: str,
        *,
        truncate_dim: int | None,
        batch_size: int,
        dtype: str,
        device: str | None,
        local_rank: int,
        local_files_only: bool,
    ) -> None:
        library = optional("sentence_transformers", "sentence-transformers")
        import torch

        if device is None and torch.cuda.is_available():
            device = f"cuda:{local_rank % torch.cuda.device_count()}"
        try:
            self.model = library.SentenceTransformer(
                model,
                device=device,
                truncate_dim=truncate_dim,
                local_files_only=local_files_only,
                model_kwargs={"torch_dtype": getattr(torch, dtype)},
            )
        except Exception as error:  # each backend of the library raises its own
            raise UserError(f"--encoder-model {model}: cannot be loaded ({str(error).splitlines()[0]})") from error
        self.batch_size = batch_size
        self.description = {
            "name": "sentence_transformers",
            "model": model,
            "truncate_dim": truncate_dim,
            "dtype": dtype,
        }

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        latents = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            show_progress_bar=False,
            convert_to_numpy=False,
            convert_to_tensor=True,
        )
        return latents.float().cpu().numpy()


def optional(module: str, package: str) -> Any:
    """Import a library that only some users need; UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the Python package {package} is not installed: pip install {package}") from error
