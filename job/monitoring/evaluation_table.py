"""An evaluation in words: the table of its metrics, the line of the progress, and what the figures say of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping

from job.metric_names import EVALUATION, POOL, at_timesteps

# Below these a direction counts as blind: any other sample's input serves it as well. The alerts take the same numbers.
IGNORED_LATENT_GAIN = 0.05  # nats per token
IGNORED_TEXT_GAIN = 0.02  # as a share of the error with shuffled texts, since latents have no unit of their own

# What needs no model, and is therefore no merit of one.
GUESSES = {
    "text/most_frequent_token_acc": "always guessing the most frequent token",
    "text/most_frequent_at_place_acc": "guessing the most frequent token of each place",
}


def table(metrics: Mapping[str, float]) -> str:
    """The metrics as aligned lines with their meaning, and the verdicts.

    Metrics that were not measured have no line.
    """
    lines = [f"{metrics['samples']:.0f} held-out texts, {metrics['tokens']:.0f} tokens"]
    for metric in EVALUATION:
        if metric.key in metrics:
            noisy = ", ".join(f"{t}: {value:.3f}" for t, value in at_timesteps(metric.key, metrics).items())
            lines.append(
                f"  {metric.key:<31} {metrics[metric.key]:>9.4g}  "
                + metric.words.replace(POOL, f"{metrics['samples']:.0f}")
                + (f" (at t={noisy})" if noisy else "")
            )
    return "\n".join([*lines, *(f"=> {verdict}" for verdict in verdicts(metrics))])


def headline(metrics: Mapping[str, float]) -> str:
    """The metrics that tell most, in one line."""
    return "  ".join(
        f"{metric.key} {metrics[metric.key]:.3f}" for metric in EVALUATION if metric.headline and metric.key in metrics
    )


def verdicts(metrics: Mapping[str, float]) -> list[str]:
    """What the figures mean: does the decoder use the latent, the encoder the text, and does the round trip work?"""
    latent_gain, text_gain = metrics["l2t/latent_gain"], metrics["t2l/text_gain"]
    if not (math.isfinite(latent_gain) and math.isfinite(text_gain)):
        return [f"the model is broken: latent_gain is {latent_gain}, text_gain {text_gain}"]
    return [_decoder(metrics), _encoder(metrics), _round_trip(metrics)]


def ignores_latent(metrics: Mapping[str, float]) -> bool:
    """Whether any other latent would serve the decoder as well."""
    return not metrics["l2t/latent_gain"] >= IGNORED_LATENT_GAIN


def ignores_text(metrics: Mapping[str, float]) -> bool:
    """Whether any other text would serve the encoder as well."""
    text_gain = metrics["t2l/text_gain"]
    with_shuffled_texts = text_gain + metrics["t2l/x0_mse"]
    return not text_gain >= IGNORED_TEXT_GAIN * with_shuffled_texts


def _decoder(metrics: Mapping[str, float]) -> str:
    if ignores_latent(metrics):
        latent_gain = metrics["l2t/latent_gain"]
        return f"the decoder ignores the latent: any other serves as well (latent_gain {latent_gain:.3f})"
    return "the decoder uses the latent"


def _encoder(metrics: Mapping[str, float]) -> str:
    if ignores_text(metrics):
        return f"the encoder ignores the text: any other serves as well (text_gain {metrics['t2l/text_gain']:.3f})"
    return "the encoder uses the text"


def _round_trip(metrics: Mapping[str, float]) -> str:
    accuracy = metrics["t2l2t/token_acc"]
    floor, guess = max((metrics[key], words) for key, words in GUESSES.items() if key in metrics)
    if accuracy <= floor:
        return f"text -> latent -> text is no better than {guess} ({accuracy:.1%} and {floor:.1%} of the tokens)"
    return f"text -> latent -> text gets {accuracy:.1%} of the tokens right, {guess} {floor:.1%}"
