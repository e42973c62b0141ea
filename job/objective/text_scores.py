"""What texts that a model made are worth: against the true ones, and against guesses that need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from job.config import DecodingConfig


@dataclass(frozen=True)
class TextScoring:
    """How an evaluation makes texts and reads them."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    count: int = 0  # texts that are made; the first ones of the evaluation set
    special: Sequence[int] = ()  # ids that are no words, such as BERT's [CLS]: they are right without any model
    detokenize: Callable[[Sequence[int]], str] | None = None  # None: no scores of words and letters

    def words(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The places [N, S] of tokens [N, S] that count: real ones (mask) that are no special tokens."""
        return mask & ~torch.isin(tokens, torch.tensor(list(self.special), dtype=tokens.dtype, device=tokens.device))


def most_frequent_accuracy(tokens: Tensor, counted: Tensor) -> float:
    """Share of the counted [N, S] tokens [N, S] that are right for always guessing the most frequent one."""
    found = tokens[counted]
    return float(found.bincount().max()) / found.numel() if found.numel() else 0.0


def most_frequent_at_place_accuracy(tokens: Tensor, mask: Tensor, counted: Tensor) -> float:
    """The same for guessing at each place the token that is most frequent there in all *other* texts.

    Places of the first half of a text are counted from its start, those of the second half from its end. Others' texts
    alone: at a place that few texts have, the most frequent token would be the text's own. A tie counts half.
    """
    lengths = mask.sum(1, keepdim=True)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    from_end = lengths - 1 - places
    place = torch.where(places <= from_end, 2 * places, 2 * from_end + 1)[counted]
    found = tokens[counted]
    if not found.numel():
        return 0.0
    # One row for each token that occurs at a place, with how often it does; sorted, so a place's rows are together.
    pairs, count = torch.stack([place, found], 1).unique(dim=0, return_counts=True)
    right = torch.zeros((), dtype=torch.float64)
    for rows in count.split(pairs[:, 0].unique_consecutive(return_counts=True)[1].tolist()):
        likeliest = rows.topk(min(2, len(rows))).values.tolist()
        first, second = likeliest if len(likeliest) == 2 else (likeliest[0], 0)
        # Without the text itself the first token counts one less; all other tokens are guessed wrong.
        others = first - 1
        right += first * float((others > second) + 0.5 * (others == second and others > 0))
    return float(right) / found.numel()


def exact_match(made: Tensor, truth: Tensor, counted: Tensor) -> float:
    """Share of texts [N, S] whose counted [N, S] tokens are all right."""
    return float(((made == truth) | ~counted).all(1).double().mean())


def token_accuracy(made: Tensor, truth: Tensor, counted: Tensor) -> float:
    """Share of counted [N, S] tokens that are right."""
    return float((made == truth)[counted].double().mean()) if bool(counted.any()) else 0.0


def repeats(tokens: Tensor, mask: Tensor) -> float:
    """Share of neighbouring tokens that are equal."""
    pairs = mask[:, 1:] & mask[:, :-1]
    return float((tokens[:, 1:] == tokens[:, :-1])[pairs].double().mean()) if bool(pairs.any()) else 0.0


def distinct_pairs(tokens: Tensor, mask: Tensor) -> float:
    """Different pairs of neighbouring tokens as a share of all such pairs (distinct-2, Li et al. 2016)."""
    pairs = mask[:, 1:] & mask[:, :-1]
    found = torch.stack([tokens[:, :-1][pairs], tokens[:, 1:][pairs]], 1)
    return len(found.unique(dim=0)) / len(found) if len(found) else 0.0


def bleu_and_chrf(made: Sequence[str], truth: Sequence[str]) -> tuple[float, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of texts, both of a corpus and in [0, 100]."""
    import sacrebleu  # only here: it takes a third of a second to load

    references = [list(truth)]
    return (
        sacrebleu.corpus_bleu(list(made), references).score,
        sacrebleu.corpus_chrf(list(made), references).score,
    )


def scores_of_generated(made: dict[str, Tensor], truth: Tensor, mask: Tensor, scoring: TextScoring) -> dict[str, float]:
    """Metrics of texts [N, S] made of the true latents ("l2t") and of the predicted ones ("t2l2t")."""
    counted = scoring.words(truth, mask)
    metrics = {"text/repeats": repeats(truth, mask), "text/distinct_2": distinct_pairs(truth, mask)}
    for name, tokens in made.items():
        metrics |= {
            f"{name}/decoded_token_acc": token_accuracy(tokens, truth, counted),
            f"{name}/exact_match": exact_match(tokens, truth, counted),
        }
        if scoring.detokenize is not None:
            metrics[f"{name}/bleu"], metrics[f"{name}/chrf"] = bleu_and_chrf(
                _texts(tokens, mask, scoring.detokenize), _texts(truth, mask, scoring.detokenize)
            )
    metrics |= {
        "t2l2t/repeats": repeats(made["t2l2t"], mask),
        "t2l2t/distinct_2": distinct_pairs(made["t2l2t"], mask),
    }
    return metrics


def _texts(tokens: Tensor, mask: Tensor, detokenize: Callable[[Sequence[int]], str]) -> list[str]:
    return [detokenize(row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]
