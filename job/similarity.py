"""Judges of a model besides its own losses: people's scores of pairs of texts, and the encoder that made its data."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from job.api import Model
from job.errors import UserError
from job.tables import aligned

COLUMNS = ("sentence1", "sentence2", "score")  # as STS benchmarks name them
TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Pair:
    """Two texts, and how alike they are, on whatever scale."""

    first: str
    second: str
    score: float


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a .jsonl, or of a .csv or .tsv with a header, with the columns of COLUMNS. UserError naming the line."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sts {path}: cannot be read ({error})") from error
    if path.suffix == ".jsonl":
        rows = [_object(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif path.suffix in TABLES:
        rows = _table(text, path.suffix)
    else:
        raise UserError(f"--sts {path}: give a .jsonl, .csv or .tsv")
    pairs = [_pair(path, number, row) for number, row in enumerate(rows, 1)]
    if len(pairs) < 3 or len({pair.score for pair in pairs}) < 2:
        raise UserError(f"--sts {path}: {len(pairs)} pairs; a rank correlation needs three, not all of one score")
    return pairs


def _object(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(f"--sts {path}: line {number} is no JSON object ({error})") from error


def _table(text: str, suffix: str) -> list[dict[str, object]]:
    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    # In a .tsv quotes are part of the sentences, which may have a single one.
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))


def _pair(path: Path, number: int, row: dict[str, object]) -> Pair:
    try:
        first, second, score = (row[name] for name in COLUMNS)
        if not isinstance(first, str) or not isinstance(second, str):
            raise ValueError(f"{COLUMNS[0]} and {COLUMNS[1]} must be texts")
        found = Pair(first, second, float(score))  # type: ignore[arg-type]
    except KeyError as error:
        raise UserError(
            f"--sts {path}: pair {number} has no {error.args[0]}; needed are {', '.join(COLUMNS)}"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"--sts {path}: pair {number}: {error}") from error
    if not np.isfinite(found.score):
        raise UserError(f"--sts {path}: pair {number}: score {found.score} is no number to rank")
    return found


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine [N] of the rows of [N, D]; 0 where a row is zero."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.einsum("nd,nd->n", a, b) / np.where(lengths > 0, lengths, 1.0)


def rank_correlation(model: Model, pairs: Sequence[Pair], batch_size: int, seed: int = 0) -> dict[str, float]:
    """Spearman's correlation of given scores with the cosine of latents: predicted ones, and the encoder's own.

    The encoder's is what the model could reach by predicting without error; it is left out where the encoder is not at
    hand. Texts of too many tokens are cut.
    """
    from scipy.stats import spearmanr  # takes a second to load

    scores = [pair.score for pair in pairs]
    firsts, seconds = [pair.first for pair in pairs], [pair.second for pair in pairs]

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(spearmanr(cosines(a, b), scores).statistic)

    predicted = (model.encode(texts, truncate=True, seed=seed, batch_size=batch_size) for texts in (firsts, seconds))
    found = {"pairs": float(len(pairs)), "sts/spearman": correlation(*predicted)}
    try:
        encoder = model.encoder()
    except UserError:
        return found
    return found | {"sts/spearman_encoder": correlation(encoder.encode(firsts), encoder.encode(seconds))}


def re_encoded(model: Model, count: int, batch_size: int, seed: int = 0) -> dict[str, float]:
    """What the source encoder says of `count` held-out texts that went through the model and back.

    `*/re_encoded_cos` is the cosine of a decoded text's own latent to the true one; `*/re_encoded_at_1` how often the
    true latent is the nearest of all to it. The model's T2L cannot help here, since it is not asked: a round trip that
    only the model itself understands scores no better than another text (`shuffled`). `text` is the true text, for
    what tokens alone lose. UserError where the encoder or the tokenizer is not at hand.
    """
    encoder, tokenizer, data = model.encoder(), model.tokenizer, model.trained.held_out
    samples = [data[index] for index in range(min(count, len(data)))]
    rows = [np.asarray(tokens, np.int64) for tokens, _ in samples]
    true = np.stack([latent for _, latent in samples]).astype(np.float32)
    lengths = [len(row) for row in rows]
    predicted = model.encode_ids(rows, seed=seed, batch_size=batch_size)
    made = {
        "text": rows,
        "l2t": model.decode_ids(true, lengths, seed=seed, batch_size=batch_size),
        "t2l2t": model.decode_ids(predicted, lengths, seed=seed, batch_size=batch_size),
    }
    found = {"re_encoded": float(len(rows))}
    for name, ids in made.items():
        latents = encoder.encode([tokenizer.decode(row) for row in ids])
        found[f"{name}/re_encoded_cos"] = float(cosines(latents, true).mean())
        found[f"{name}/re_encoded_at_1"] = nearest_is_own(latents, true)
    found["shuffled/re_encoded_cos"] = float(cosines(np.roll(true, len(true) // 2, axis=0), true).mean())
    return found


def nearest_is_own(latents: np.ndarray, true: np.ndarray) -> float:
    """How often a row's nearest, by cosine, of the true latents [N, D] is its own; a tie counts as chance."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (latents, true)]
    similarity = unit[0] @ unit[1].T
    own = similarity.diagonal()[:, None]
    larger, equal = (similarity > own + 1e-6).sum(1), (np.abs(similarity - own) <= 1e-6).sum(1)
    return float(np.where(larger == 0, 1 / equal, 0.0).mean())


def correlation_in_words(step: int, found: Mapping[str, float]) -> str:
    """A rank correlation in words."""
    own = found.get("sts/spearman_encoder")
    of_encoder = "the encoder is not at hand" if own is None else f"{own:.3f} of the encoder's own latents"
    predicted = f"Spearman {found['sts/spearman']:.3f} of predicted latents"
    return f"step {step}, {found['pairs']:.0f} pairs: {predicted}, {of_encoder}"


def re_encoded_table(found: Mapping[str, float]) -> list[str]:
    """What the source encoder says, as a table."""
    rows = [("encoded again by the source encoder", "cosine to the true latent", "true latent is the nearest")]
    words = {
        "text": "true text",
        "l2t": "decoded from its latent",
        "t2l2t": "decoded from the latent predicted from it",
    }
    for name, what in words.items():
        rows.append((what, f"{found[f'{name}/re_encoded_cos']:.3f}", f"{found[f'{name}/re_encoded_at_1']:.1%}"))
    rows.append(("another text", f"{found['shuffled/re_encoded_cos']:.3f}", f"{1 / found['re_encoded']:.1%}"))
    return aligned(rows)
