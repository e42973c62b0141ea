"""curves.png: what a run's two logs hold, against steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from job.files import json_lines, write_whole

Log = list[dict[str, float]]

# Title of each panel, which log it shows, and the metrics in it.
PANELS: Sequence[tuple[str, str, Sequence[str]]] = (
    ("text losses", "train", ("base_l2t_text_loss", "cycle_text_loss", "text_loss")),
    ("latent losses", "train", ("base_t2l_latent_loss", "cycle_latent_loss", "latent_loss")),
    ("weights of the cycle terms", "train", ("cycle_text_weight", "cycle_latent_weight")),
    ("learning rate", "train", ("lr",)),
    ("gradient norm", "train", ("grad_norm",)),
    ("tokens per second", "train", ("tokens_per_second",)),
    ("held-out cross-entropy, nats per token", "eval", ("l2t/ce", "t2l2t/ce", "pseudo/entropy")),
    ("held-out token accuracy", "eval", ("l2t/token_acc", "t2l2t/token_acc", "text/most_frequent_token_acc")),
    ("what latent (nats) and text (MSE) bring", "eval", ("l2t/latent_gain", "t2l/text_gain")),
    (
        "cosine of predicted latents",
        "eval",
        ("t2l/x0_cos", "t2l/x0_cos@0.9", "t2l/x0_cos@0.5", "t2l/x0_cos@0.25", "l2t2l/cos"),
    ),
    ("error and length of predicted latents, t=1", "eval", ("t2l/x0_mse", "t2l/x0_norm_ratio", "l2t2l/retrieval_at_1")),
    ("latent directions in use", "eval", ("latent/active_dims", "latent/active_dims_data")),
)
COLUMNS = 3
MARKED = 30  # fewer points than this are marked


def write_curves(run_dir: Path) -> None:
    """Draw training_log.jsonl and evaluation.jsonl of a run directory into its curves.png, whole or not at all.

    A metric that a log does not hold, and a panel without any, is left out.
    """
    logs = {"train": json_lines(run_dir / "training_log.jsonl"), "eval": json_lines(run_dir / "evaluation.jsonl")}
    panels = [
        (title, logs[log], names)
        for title, log, names in PANELS
        if any(name in line for line in logs[log] for name in names)
    ]
    rows = max(1, math.ceil(len(panels) / COLUMNS))
    figure = Figure(figsize=(5 * COLUMNS, 3 * rows), layout="constrained")
    figure.suptitle(run_dir.resolve().name)
    for number, (title, log, names) in enumerate(panels, start=1):
        draw(figure.add_subplot(rows, COLUMNS, number), title, log, names)
    write_whole(run_dir / "curves.png", lambda file: figure.savefig(file, format="png", dpi=100))


def draw(axes: Axes, title: str, log: Log, names: Sequence[str]) -> None:
    """One panel: these metrics of a log against its steps."""
    for name in names:
        points = [(line["step"], line[name]) for line in log if name in line]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < MARKED else None
            )
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
