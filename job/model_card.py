"""The model card of an exported model: README.md, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from job.data.description import SHOWN_DIGITS, encoder_words
from job.files import json_lines
from job.metric_names import EVALUATION
from job.model.weights import describe
from job.monitoring.evaluation_table import table
from job.trained import CONFIG_FILE, Trained, run_directory
from job.versions import installed_version

CARD_FILE = "README.md"
FIGURES_KEY = "evaluation"  # of config.json
VERSIONS = ("cyclevae", "torch", "mmdit", "hyper-connections", "x-transformers", "tokenizers", "safetensors")

WITH_TOKENIZER = """\
latents = model.encode(["A text."])  # float32 [1, {latent_dim}], in the units of the encoder below
texts = model.decode(latents)"""
WITHOUT_TOKENIZER = """\
latents = model.encode_ids([[5, 6, 7]])  # token ids -> float32 [1, {latent_dim}], in the units of the training data
tokens = model.decode_ids(latents)"""
ON_THE_COMMAND_LINE = """

On the command line `cyclevae encode {name} texts.txt latents.npy`, `cyclevae decode {name} latents.npy texts.txt`."""
HOW_TO_LOAD = """\
```python
from job import load  # of the package cyclevae

model = load("{name}")  # this directory
{calls}
```{command_line}

`training.init_from={name}` trains it further."""


def held_out_figures(trained: Trained) -> dict[str, float]:
    """The evaluation that the run made of these weights; empty where it made none of them."""
    if (trained.path / CONFIG_FILE).is_file():
        figures: dict[str, float] = json.loads((trained.path / CONFIG_FILE).read_text()).get(FIGURES_KEY, {})
        return figures
    # Training evaluates the moving average where it keeps one, so the figures are not those of the other weights.
    if trained.averaged != (trained.config.training.ema_decay > 0):
        return {}
    run = run_directory(trained.path)
    lines = json_lines(run / "evaluation.jsonl") or json_lines(run.parent / "evaluation.jsonl")
    return next((line for line in reversed(lines) if line.get("step") == trained.step), {})


def model_card(trained: Trained, name: str) -> str:
    """The card of a model that is exported as `name`."""
    figures = held_out_figures(trained)
    front_matter = yaml.safe_dump(_front_matter(trained, name, figures), sort_keys=False, allow_unicode=True)
    measured = "The run did not evaluate these weights."
    if figures:
        measured = f"Of step {trained.step}, with latents standardized:\n\n```\n{table(figures)}\n```"
    sections = [
        f"# {name}",
        "Texts to latents and latents to texts: a multimodal MMDiT, trained in both directions by cyclevae "
        f"(loss.loss_type={trained.config.loss.loss_type}).",
        "## How to load it",
        _how_to_load(trained, name),
        "## Data",
        _markdown_table(_data_rows(trained)),
        "## Held-out figures",
        measured,
        "## Configuration",
        _markdown_table(_configuration_rows(trained)),
        "All of it is in config.json.",
        "## Versions",
        _markdown_table((package, installed_version(package) or "not installed") for package in VERSIONS),
    ]
    return f"---\n{front_matter}---\n\n" + "\n\n".join(sections) + "\n"


def _how_to_load(trained: Trained, name: str) -> str:
    """What a reader can do with the model: without a tokenizer it takes and gives token ids alone."""
    has_tokenizer = trained.tokenizer is not None
    calls = WITH_TOKENIZER if has_tokenizer else WITHOUT_TOKENIZER
    command_line = ON_THE_COMMAND_LINE.format(name=name) if has_tokenizer else ""
    return HOW_TO_LOAD.format(name=name, calls=calls.format(latent_dim=trained.latent_dim), command_line=command_line)


def _front_matter(trained: Trained, name: str, figures: dict[str, float]) -> dict[str, Any]:
    """What the hub reads: the library, tags, and the figures as its leaderboards take them."""
    values: dict[str, Any] = {
        "library_name": "cyclevae",
        "pipeline_tag": "feature-extraction",
        "tags": ["text-to-latent", "latent-to-text", "masked-diffusion", "mmdit"],
    }
    shown = [metric for metric in EVALUATION if metric.headline and metric.key in figures]
    if shown:
        metrics = [{"type": m.key, "name": m.words, "value": round(figures[m.key], 4)} for m in shown]
        dataset = {"type": "text", "name": f"{_data_name(trained)}, held-out texts"}
        task = {"type": "feature-extraction", "name": "text to latent and back"}
        values["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return values


def _data_name(trained: Trained) -> str:
    """The name of the data's directory: its path is of a machine that nobody else knows."""
    return Path(trained.config.data.dir).name if trained.config.data.dir else trained.config.data.source


def _data_rows(trained: Trained) -> list[tuple[str, str]]:
    description = trained.description
    digest = description.tokenizer_hash
    tokenizer = f"{description.vocab_size} tokens, SHA-256 {digest[:SHOWN_DIGITS]}" if digest else "none"
    standardized = "with the mean and standard deviation in model.json" if description.standardize else "not"
    return [
        ("data", _data_name(trained)),
        ("training texts", f"{description.samples:,}, of at most {description.max_length} tokens"),
        ("tokenizer", tokenizer),
        ("latents", f"{description.latent_dim} dimensions"),
        ("encoder", encoder_words(description.encoder) or "unknown"),
        ("standardized", standardized),
    ]


def _configuration_rows(trained: Trained) -> list[tuple[str, str]]:
    config = trained.config
    shape = {f"model.{name}": value for name, value in describe(trained.weights).items()}
    parameters = sum(tensor.numel() for tensor in trained.weights.values()) / 1e6
    trained_with = {
        "loss.loss_type": config.loss.loss_type,
        "loss.latent_loss_weight": config.loss.latent_loss_weight,
        "loss.cycle_text_weight": config.loss.cycle_text_weight,
        "loss.cycle_latent_weight": config.loss.cycle_latent_weight,
        "optimizer.lr": config.optimizer.lr,
        "training.lr_schedule": config.training.lr_schedule,
        "steps": f"{trained.step} of {config.training.num_train_steps}",
        "weights": "moving average" if trained.averaged else "of the last step",
    }
    rows = {"parameters": f"{parameters:.1f} M", **shape, **trained_with}
    return [(name, str(value)) for name, value in rows.items()]


def _markdown_table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
