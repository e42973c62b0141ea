"""Where a model's latents lie: the variance of true and predicted ones by direction, and a map of both."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
import torch

from job.config import DecodingConfig
from job.data.loader import BatchFormat
from job.data.shards import Dataset
from job.objective.cycle_decoding import encode
from job.objective.objective import Objective
from job.pages.blocks import Block, Text
from job.pages.page import Section
from job.pages.plots import Plot
from job.round_trips import as_texts
from job.trained import first_batches, tokenizer_of

COUNT = 256  # held-out texts
DIRECTIONS = 64  # at most, the first ones
TEXT_WIDTH = 80  # characters of a text beside its point


@dataclass(frozen=True)
class Latents:
    """Standardized latents of the same texts."""

    step: int
    texts: list[str]
    true: np.ndarray  # [N, D]
    predicted: np.ndarray  # [N, D]


def measure(
    objective: Objective,
    dataset: Dataset,
    format: BatchFormat,
    step: int,
    batch_size: int,
    decoding: DecodingConfig,
    seed: int,
) -> Latents:
    """True latents of the first COUNT held-out texts, and those that the model predicts from them."""
    device, tokenizer = next(objective.parameters()).device, tokenizer_of(dataset)
    was_training = objective.training
    texts: list[str] = []
    true, predicted = [], []
    objective.eval()
    for batch in first_batches(dataset, format, COUNT, batch_size):
        tokens, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        true.append(batch["latent"].float())
        predicted.append(encode(objective, tokens, mask, decoding, seed).float().cpu())
        texts += as_texts(tokenizer, tokens, mask)
    objective.train(was_training)
    return Latents(step, texts, torch.cat(true).numpy(), torch.cat(predicted).numpy())


def section(latents: Latents | None, why_not: str) -> Section:
    """The section of the report; `why_not` is shown where there are no latents."""
    if latents is None:
        return Section("Latents", [Text(why_not, "note")])
    mean = latents.true.mean(0)
    # The directions along which the true latents vary most; the predicted ones are seen along the same.
    _, _, directions = np.linalg.svd(latents.true - mean, full_matrices=False)
    true, predicted = ((values - mean) @ directions.T for values in (latents.true, latents.predicted))
    blocks: list[Block] = [
        Text(
            f"{len(true)} held-out texts at step {latents.step}, standardized latents of {latents.true.shape[1]} "
            "dimensions, along the directions of largest variance of the true ones."
        ),
        variances(true, predicted),
        latent_map(latents.texts, true, predicted),
    ]
    return Section("Latents", blocks)


def variances(true: np.ndarray, predicted: np.ndarray) -> Plot:
    """Variance of both [N, D] along each direction."""
    shown = min(DIRECTIONS, true.shape[1])
    numbers = list(range(1, shown + 1))
    traces = [
        {"type": "scatter", "mode": "lines", "name": name, "x": numbers, "y": values.var(0)[:shown].tolist()}
        for name, values in (("true", true), ("predicted", predicted))
    ]
    layout = {
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "direction"}},
        "yaxis": {"title": {"text": "variance"}, "type": "log"},
    }
    caption = "Predicted latents that vary less than the true ones say less of their text; none at all: a collapse."
    return Plot("Variance per direction", traces, layout, caption)


def latent_map(texts: list[str], true: np.ndarray, predicted: np.ndarray) -> Plot:
    """Both [N, D] along the first two directions, with a line from each true latent to its predicted one."""
    second = min(1, true.shape[1] - 1)  # latents of one dimension lie on the diagonal
    labels = [textwrap.shorten(text, TEXT_WIDTH, placeholder=" ...").replace("<", "&lt;") for text in texts]
    ways: dict[str, list[float | None]] = {"x": [], "y": []}
    for start, end in zip(true, predicted, strict=True):
        ways["x"] += [float(start[0]), float(end[0]), None]
        ways["y"] += [float(start[second]), float(end[second]), None]
    between = {"type": "scatter", "mode": "lines", "name": "from true to predicted", **ways, "hoverinfo": "skip"}
    traces: list[dict[str, object]] = [between | {"line": {"width": 0.7}, "opacity": 0.4, "showlegend": False}]
    for name, values, symbol in (("true", true, "circle"), ("predicted", predicted, "diamond-open")):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": values[:, 0].tolist(),
                "y": values[:, second].tolist(),
                "text": labels,
                "hovertemplate": "%{text}",
                "marker": {"size": 6, "symbol": symbol},
            }
        )
    layout = {
        "hovermode": "closest",
        "xaxis": {"title": {"text": "direction 1"}},
        "yaxis": {"title": {"text": "direction 2"}},
    }
    return Plot(
        "Map of latents",
        traces,
        layout,
        "A point for each text; a line leads from its true latent to the predicted one.",
    )
