"""Text encoders: one latent per text."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from job.data.optional import import_optional
from job.data.options import LocalOptions, Options
from job.errors import UserError

MAX_FEATURES = 50_000  # words of the TF-IDF vocabulary, the most frequent ones
# Fitting holds the features of all its texts in memory at once, so it takes a sample. The texts come in the order of
# their hashes (splitting.py), so the first ones are a random sample, and the same one on every machine.
FIT_SAMPLES = 1_000_000


class Encoder(Protocol):
    """Latents of texts."""

    description: dict[str, Any]  # what dataset.json says of it

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        ...


class LsaEncoder:
    """Latent semantic analysis (Deerwester et al. 1990): TF-IDF of words and a truncated SVD.

    The default, because it needs no model from elsewhere and is fitted in seconds; its latents know words, not order.
    """

    def __init__(self, pipeline: Any, description: dict[str, Any]) -> None:
        self.pipeline = pipeline
        self.description = description

    @classmethod
    def fit(cls, texts: Sequence[str], latent_dim: int, seed: int) -> LsaEncoder:
        """Fit on the training texts. UserError if they have fewer different words than dimensions."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline

        tfidf = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", max_features=MAX_FEATURES)
        svd = TruncatedSVD(latent_dim, random_state=seed)
        # One thread: with more, the order of sums, and with it the last bits, depends on the machine's cores and on
        # torchrun, and a dataset prepared again would have another fingerprint.
        with threadpool_limits(1):
            try:
                features = tfidf.fit_transform(texts[:FIT_SAMPLES])
                if min(features.shape) <= latent_dim:
                    raise UserError(
                        f"--latent-dim {latent_dim}: the training split has only {features.shape[0]} texts with "
                        f"{features.shape[1]} different words; give more texts or fewer dimensions"
                    )
                svd.fit(features)
            except ValueError as error:
                raise UserError(f"--encoder lsa: the texts cannot be used ({error})") from error
        description = {
            "name": "lsa",
            "vocabulary": features.shape[1],
            "explained_variance": round(float(svd.explained_variance_ratio_.sum()), 4),
        }
        return cls(make_pipeline(tfidf, svd), description)

    def save(self, file: Any) -> None:
        """Write for `load`. A pickle can run code when it is read: this is a working file, never part of a dataset."""
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

    def __init__(self, options: Options, local: LocalOptions, local_rank: int) -> None:
        library = import_optional("sentence_transformers", "sentence-transformers")
        import torch  # only here: the other encoder works without loading it

        device = local.encoder_device
        if device is None and torch.cuda.is_available():
            device = f"cuda:{local_rank % torch.cuda.device_count()}"
        try:
            self.model = library.SentenceTransformer(
                options.encoder_model,
                device=device,
                truncate_dim=options.truncate_dim,
                local_files_only=local.local_files_only,
                model_kwargs={"torch_dtype": getattr(torch, str(options.encoder_dtype))},
            )
        except Exception as error:  # each backend of the library raises its own
            raise UserError(
                f"--encoder-model {options.encoder_model}: cannot be loaded ({str(error).splitlines()[0]})"
            ) from error
        self.batch_size = options.encoder_batch_size
        self.description = {
            "name": "sentence_transformers",
            "model": options.encoder_model,
            "truncate_dim": options.truncate_dim,
            "dtype": options.encoder_dtype,
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
