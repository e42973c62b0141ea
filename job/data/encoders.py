"""Text encoders: one latent per text. Fitted ones are saved with the dataset; `load_encoder` brings them back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from job.data.encoder_models import described_model, noted_directory, refuse_other, refuse_wider
from job.data.optional import import_optional
from job.data.static_encoder import MODEL2VEC, Model2VecEncoder
from job.data.truncated_svd import truncated_svd
from job.errors import UserError
from job.files import write_whole

ENCODER_FILE = "encoder.safetensors"
LSA = "lsa"
SENTENCE_TRANSFORMERS = "sentence_transformers"
GIVEN = "given"  # no encoder: the latents came with the texts (given.py)
MAX_FEATURES = 50_000  # words of the TF-IDF vocabulary, the most frequent ones
# Fitting holds the features of all its texts in memory at once, and that of a tokenizer all different words, so both
# take a sample. The texts come in the order of their hashes (splitting.py), so the first ones are a random sample, and
# the same one on every machine.
FIT_SAMPLES = 1_000_000
# How TF-IDF makes features of a text. A saved encoder relies on it: change it only under another name. Letters are
# counted in runs of two and three within a word, its ends included, so that a word never seen has a spelling all the
# same.
WORDS, LETTERS = "words", "letters"
TFIDF = {
    WORDS: {"sublinear_tf": True, "token_pattern": r"\w+"},
    LETTERS: {"sublinear_tf": True, "analyzer": "char_wb", "ngram_range": (2, 3)},
}


class Encoder(Protocol):
    """Latents of texts."""

    description: dict[str, Any]  # what dataset.json says of it; `sha256` is the same for equal encoders only

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        ...


@dataclass(frozen=True)
class Resources:
    """How this machine comes by an encoder's latents; they are the same but for rounding."""

    device: str | None = None  # None: a GPU where there is one
    local_rank: int = 0  # which GPU
    local_files_only: bool = False
    batch_size: int = 32  # texts


class LsaEncoder:
    """Latent semantic analysis (Deerwester et al. 1990): TF-IDF of words, or of letters, and a truncated SVD.

    The default, because it needs no model from elsewhere and is fitted in seconds; its latents know words, not order.
    A text without a word that was seen in training has the latent zero.

    words str [V] (or runs of letters), idf float64 [V] and projection float64 [V, D] are all that it is made of.
    """

    def __init__(
        self,
        words: Sequence[str],
        idf: np.ndarray,
        projection: np.ndarray,
        variance: float,
        features: str = WORDS,
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.words = words
        self.idf = idf
        self.projection = np.ascontiguousarray(projection)
        self.tfidf = TfidfVectorizer(vocabulary=words, **TFIDF[features])
        self.tfidf.idf_ = idf
        self.description: dict[str, Any] = {
            "name": LSA,
            "vocabulary": len(words),
            "explained_variance": variance,
            "sha256": hashlib.sha256(self.to_bytes()).hexdigest(),
        }
        if features != WORDS:  # encoders from before there was a choice do not say
            self.description["features"] = features

    @classmethod
    def fit(cls, texts: Iterable[str], latent_dim: int, seed: int, features: str = WORDS) -> LsaEncoder:
        """Fit on the first FIT_SAMPLES training texts. UserError if they have fewer different words than dimensions."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        tfidf = TfidfVectorizer(max_features=MAX_FEATURES, **TFIDF[features])
        # One thread: with more, the order of sums, and with it the last bits, depends on the machine's cores and on
        # torchrun, and a dataset prepared again would have another fingerprint.
        with threadpool_limits(1):
            try:
                counts = tfidf.fit_transform(islice(texts, FIT_SAMPLES))
                if min(counts.shape) <= latent_dim:
                    raise UserError(
                        f"--latent-dim {latent_dim}: the training split has only {counts.shape[0]} texts with "
                        f"{counts.shape[1]} different {features}; give more texts or fewer dimensions"
                    )
                projection, variance = truncated_svd(counts, latent_dim, seed)
            except ValueError as error:
                raise UserError(f"--encoder lsa: the texts cannot be used ({error})") from error
        return cls(tfidf.get_feature_names_out().tolist(), tfidf.idf_, projection, round(variance, 4), features)

    def to_bytes(self) -> bytes:
        """Content for encoder.safetensors; the words are UTF-8, a line each (none has a line end in it)."""
        words = np.frombuffer("\n".join(self.words).encode(), np.uint8)
        return safetensors.numpy.save({"words": words, "idf": self.idf, "projection": self.projection})

    def save(self, path: Path) -> None:
        """Write for `load`, whole or not at all."""
        write_whole(path, lambda file: file.write(self.to_bytes()))

    @classmethod
    def load(cls, path: Path, description: dict[str, Any]) -> LsaEncoder:
        """Read what `save` wrote. UserError for a file that is missing, damaged, or of another encoder."""
        try:
            arrays = safetensors.numpy.load(path.read_bytes())
            words = arrays["words"].tobytes().decode().split("\n")
            features = description.get("features", WORDS)
            encoder = cls(words, arrays["idf"], arrays["projection"], description["explained_variance"], features)
        except FileNotFoundError:
            raise UserError(
                f"{path}: missing, so no text can be encoded as this data was; "
                "data prepared before November 2026 has no such file: prepare it again"
            ) from None
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path}: damaged or no fitted encoder ({error}); prepare the data again") from error
        refuse_other(encoder.description, description, str(path))
        return encoder

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        if not len(texts):  # which scikit-learn refuses
            return np.empty((0, self.projection.shape[1]), np.float32)
        with threadpool_limits(1):
            return np.asarray(self.tfidf.transform(texts) @ self.projection, np.float32)


class SentenceTransformersEncoder:
    """Any model of the sentence-transformers library, by name or directory."""

    def __init__(
        self,
        model: str,
        truncate_dim: int | None,
        dtype: str,
        resources: Resources,
        *,
        prompt: str | None = None,
        normalize: bool = False,
    ) -> None:
        """`prompt` is put before every text; None leaves it to the model, which may have one of its own."""
        library = import_optional("sentence_transformers", "sentence-transformers")
        import torch  # only here: the other encoder works without loading it

        device = resources.device
        if device is None and torch.cuda.is_available():
            device = f"cuda:{resources.local_rank % torch.cuda.device_count()}"
        try:
            self.model = library.SentenceTransformer(
                model,
                device=device,
                truncate_dim=truncate_dim,
                local_files_only=resources.local_files_only,
                model_kwargs={"torch_dtype": getattr(torch, dtype)},
            )
        except Exception as error:  # each backend of the library raises its own
            problem = str(error).splitlines()[0]
            raise UserError(f"--encoder-model {model}: cannot be loaded ({problem})") from error
        self.batch_size, self.prompt, self.normalize = resources.batch_size, prompt, normalize
        refuse_wider(model, truncate_dim, self.encode(["width"]).shape[1])
        self.description: dict[str, Any] = {
            "name": SENTENCE_TRANSFORMERS,
            "model": model,
            "truncate_dim": truncate_dim,
            "dtype": dtype,
            "sha256": self._hash(truncate_dim),
        }
        if prompt is not None:
            self.description["prompt"] = prompt
        if normalize:
            self.description["normalize"] = True
        self.description |= noted_directory(model)

    @classmethod
    def load(cls, description: dict[str, Any], resources: Resources) -> SentenceTransformersEncoder:
        """The encoder that a description names. UserError if there is another one under its name now."""
        model = described_model(description)
        encoder = cls(
            model,
            description["truncate_dim"],
            description["dtype"],
            resources,
            prompt=description.get("prompt"),
            normalize=description.get("normalize", False),
        )
        refuse_other(encoder.description, description, model)
        return encoder

    def _hash(self, truncate_dim: int | None) -> str:
        """SHA-256 of the weights, by name, of what is put before a text, and of what is kept of the output."""
        import torch

        digest = hashlib.sha256(repr(truncate_dim).encode())
        if self.prompt is not None or self.normalize:  # encoders from before there were these have the hash they had
            digest.update(repr((self.prompt, self.normalize)).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        if not len(texts):  # of which the library makes an array without a width
            return self.encode(["width"])[:0]
        latents = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            prompt=self.prompt,
            normalize_embeddings=self.normalize,
            show_progress_bar=False,
            convert_to_numpy=False,
            convert_to_tensor=True,
        )
        return latents.float().cpu().numpy()


def load_encoder(directory: Path, description: dict[str, Any], resources: Resources | None = None) -> Encoder:
    """The encoder that `description` (`encoder` of a dataset.json) names; encoder.safetensors is in `directory`.

    UserError when it is not at hand: no file, a library that is not installed, latents that came without an encoder.
    """
    name = description.get("name")
    if name == LSA:
        return LsaEncoder.load(directory / ENCODER_FILE, description)
    if name == SENTENCE_TRANSFORMERS:
        return SentenceTransformersEncoder.load(description, resources or Resources())
    if name == MODEL2VEC:
        return Model2VecEncoder.load(description, (resources or Resources()).local_files_only)
    if name == GIVEN:
        where = description.get("file") or f"the key {description['key']!r}"
        raise UserError(
            f"{directory}: its latents were given with the texts ({where}), so there is no encoder for new texts; "
            "encode them with the program that made those latents"
        )
    raise UserError(f"{directory}: its latents were not made by prepare ({name}), so there is no encoder for new texts")
