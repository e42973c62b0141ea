"""Run directories as runs leave them, without training any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from job.config import Config, from_dict, to_dict

Evaluation = Mapping[str, float]


def configured(*overrides: str) -> Config:
    values = OmegaConf.from_dotlist(["data.source=synthetic", "training.num_train_steps=100", *overrides])
    return from_dict(OmegaConf.to_container(values))  # type: ignore[arg-type]


def run_directory(path: Path, *overrides: str, evaluations: Mapping[int, Evaluation], finished: bool = True) -> Path:
    """A run with these figures by step."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(to_dict(configured(*overrides))))
    (path / "environment.json").write_text("{}")
    lines = [json.dumps({"step": step, **values}) + "\n" for step, values in evaluations.items()]
    (path / "evaluation.jsonl").write_text("".join(lines))
    log = [json.dumps({"step": step, "loss": 100.0 / step, "tokens_per_second": 7.0}) + "\n" for step in (50, 100)]
    (path / "training_log.jsonl").write_text("".join(log[: 2 if finished else 1]))
    if finished:
        (path / "result.json").write_text("{}")
    return path


def sweep(root: Path, figures: Mapping[tuple[float, int], float]) -> Path:
    """Runs of loss.cycle_text_weight and training.seed, each with its accuracy."""
    for (weight, seed), value in figures.items():
        evaluations = {50: {"t2l2t/token_acc": value / 2}, 100: {"t2l2t/token_acc": value}}
        name = f"loss.cycle_text_weight={weight},training.seed={seed}"
        keys = [
            f"loss.cycle_text_weight={weight}",
            f"training.seed={seed}",
            f"logging.run_name={name.replace('/', '_')}",
        ]
        run_directory(root / name, *keys, evaluations=evaluations)
    return root
