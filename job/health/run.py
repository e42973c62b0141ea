"""A run's health in words: in which trap of the objective it is, whether it learns, whether checkpoints are whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from job import checkpoint_names
from job.checks import Check, note, trouble, well
from job.comparison.runs import CONFIG_FILE, TRAINING_LOG, Run, read_run
from job.config import DECODES_TEXTS, PREDICTS_LATENTS, Config, from_dict
from job.config_checks import LARGEST_EPSILON_T, largest_latent_t
from job.errors import UserError
from job.monitoring.evaluation_table import ignores_latent, ignores_text
from job.runtime.checkpoint import validate

SINUSOIDS, LONGEST_PERIOD = 128, 10000.0  # of job.model.multimodal.TimestepEmbedder
ALIKE = 0.9  # cosine of the embeddings of t=0 and t=1 above which noise levels are hardly told apart
LENGTHS = (0.8, 1.25)  # of predicted latents against the true ones'
EARLY = 0.1  # of the steps: before that a direction may well not have been learned yet
RISE = 1.02  # of held-out cross-entropy over its lowest value
FEW_DIRECTIONS = 0.3  # of those that the data's latents vary in
SILENT_STEPS = 20  # times a step's usual duration
SILENT_SECONDS = 300.0


def objective_checks(config: Config) -> list[Check]:
    """The traps that a configuration walks into."""
    loss, model = config.loss, config.model
    predicts = loss.loss_type not in ("l2t", "unconditional")
    checks = []
    if model.latent_parameterization == "epsilon" and predicts and largest_latent_t(config) > LARGEST_EPSILON_T:
        checks.append(
            trouble(
                "degenerate epsilon",
                f"the latent head predicts the noise at t up to {largest_latent_t(config):g}, where the noisy latent "
                "is nothing else: copying the input is perfect, the text is never read, and the latent that follows "
                "from it is the error, enlarged up to 64,000 times",
                "train with model.latent_parameterization=v_param (or x0); the decoder can be kept: training.init_from",
            )
        )
    if loss.normalize_latent_loss and predicts:
        checks.append(
            trouble(
                "direction-only loss",
                "loss.normalize_latent_loss=true compares unit vectors: the length of a latent is not trained, and "
                "decoding, which reads it, meets lengths that it never saw",
                "go on with loss.normalize_latent_loss=false (training.allow_changed, or training.init_from)",
            )
        )
    alike = embedding_cosine(model.time_scale)
    if alike > ALIKE:
        words = f"model.time_scale={model.time_scale:g}: the network sees t=0 and t=1 as {alike:.0%} the same"
        if loss.latent_t_mode == "random" or loss.text_t_mode == "random":
            remedy = "train with model.time_scale=1000; weights that know unscaled time have to learn it anew"
            checks.append(trouble("unscaled time", f"{words}, though it is trained at many noise levels", remedy))
        else:
            checks.append(note("unscaled time", f"{words}; it is trained at t=1 alone, so this costs nothing yet"))
    return checks or [well("objective", "none of its known traps")]


def embedding_cosine(scale: float) -> float:
    """Cosine of the sinusoidal embeddings of t=0 and t=1."""
    frequencies = np.exp(-math.log(LONGEST_PERIOD) * np.arange(SINUSOIDS) / SINUSOIDS)
    return float(np.cos(scale * frequencies).mean())


def run_checks(path: Path) -> list[Check]:
    """All that is said of a run. UserError for a directory that is none."""
    run = read_run(path)
    config = from_dict(_values(path))
    checks = [progress_check(run), *objective_checks(config), *learning_checks(run)]
    return [*checks, checkpoint_check(path)]


def _values(path: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(path / CONFIG_FILE))  # type: ignore[return-value]


def progress_check(run: Run) -> Check:
    """How far it came, whether it still moves, and whether updates were skipped."""
    log = run.path / TRAINING_LOG
    last: Mapping[str, float] = run.training[-1] if run.training else {}
    words = f"step {run.steps} of {run.target_steps}"
    skipped = int(last.get("nonfinite_steps", 0))
    if not all(math.isfinite(value) for value in last.values()) or skipped:
        remedy = "lower optimizer.lr, set optimizer.grad_clip_norm=1, try training.dtype=fp32"
        return trouble("progress", f"{words}; {skipped} updates were skipped, not finite", remedy)
    if run.finished:
        return well("progress", f"finished, {words}")
    silent = time.time() - log.stat().st_mtime if log.exists() else 0.0
    interval = float(run.settings["logging.log_freq"]) * last.get("step_seconds", 0.0)
    if silent > max(SILENT_SECONDS, SILENT_STEPS * interval):
        remedy = "start it again: the same command goes on; `cyclevae slurm status` and `k8s status` know why it ended"
        return note("progress", f"{words}; not a word for {silent / 60:.0f} min, so it was stopped or hangs", remedy)
    return well("progress", words)


@dataclass(frozen=True)
class Direction:
    """What tells whether one of the two directions reads its input."""

    gain: str  # in the name of the verdict
    key: str  # of the evaluation
    ignores: Callable[[Mapping[str, float]], bool]
    trained_by: tuple[str, ...]  # values of loss.loss_type
    words: str
    remedy: str


DECODER = Direction(
    "latent gain",
    "l2t/latent_gain",
    ignores_latent,
    DECODES_TEXTS[1],
    "the decoder ignores the latent: any other serves as well",
    "train longer, lower optimizer.lr, raise loss.text_full_share, look at the data's latents",
)
ENCODER = Direction(
    "text gain",
    "t2l/text_gain",
    ignores_text,
    PREDICTS_LATENTS[1],
    "the encoder ignores the text: any other serves as well",
    "raise loss.latent_loss_weight, and look whether the objective is in one of its traps",
)


def learning_checks(run: Run) -> list[Check]:
    """What the evaluations say of the directions that the run trains."""
    if not run.evaluations:
        return [note("learning", "no evaluation yet: nothing is known of what it learns", "lower logging.eval_freq")]
    loss_type = run.settings["loss.loss_type"]
    last = run.evaluations[-1]
    early = last["step"] < EARLY * run.target_steps
    trained = [direction for direction in (DECODER, ENCODER) if loss_type in direction.trained_by]
    checks = [check for direction in trained for check in gain_checks(direction, run.evaluations, early)]
    if ENCODER in trained:
        checks += length_checks(last, early)
    if DECODER in trained:
        checks += fit_checks(run.evaluations)
    if not trained:
        return [note("learning", f"nothing here judges loss.loss_type={loss_type}")]
    return checks or [well("learning", "what it trains uses its input")]


def gain_checks(direction: Direction, evaluations: Sequence[Mapping[str, float]], early: bool) -> list[Check]:
    """Whether a direction ignores its input."""
    last, key = evaluations[-1], direction.key
    if not direction.ignores(last):
        return []
    best = max(evaluations, key=lambda line: line[key])
    fell = not direction.ignores(best)
    said = f"{direction.words} ({key} {last[key]:.3g}"
    said += f", it was {best[key]:.3g} at step {best['step']:.0f})" if fell else ")"
    if early and not fell:
        return [note(f"collapsed {direction.gain}", f"{said}; it is early")]
    return [trouble(f"collapsed {direction.gain}", said, direction.remedy)]


def length_checks(last: Mapping[str, float], early: bool) -> list[Check]:
    """Whether predicted latents have the length and the directions of the true ones."""
    checks = []
    ratio = last.get("t2l/x0_norm_ratio", 1.0)
    # The best guess in mean square is shorter than the truth by as much as it is unsure, by the cosine between them.
    shortest = LENGTHS[0] * min(1.0, max(0.0, last.get("t2l/x0_cos", 1.0)))
    if not shortest <= ratio <= LENGTHS[1] and not early:
        words = f"predicted latents are {ratio:.3g} times as long as the true ones: the decoder never saw such"
        checks.append(
            trouble(
                "latent length", words, "loss.normalize_latent_loss=false, model.latent_parameterization=v_param or x0"
            )
        )
    used, there = last.get("latent/active_dims", 0.0), last.get("latent/active_dims_data", 0.0)
    if there and used < FEW_DIRECTIONS * there and not early:
        words = f"predicted latents vary in {used:.3g} directions, the data's in {there:.3g}: texts come out alike"
        checks.append(note("latent directions", words, "train longer; a wider model.hidden_size"))
    return checks


def fit_checks(evaluations: Sequence[Mapping[str, float]]) -> list[Check]:
    """Whether held-out texts have become worse."""
    lowest = min(evaluations, key=lambda line: line["l2t/ce"])
    last = evaluations[-1]
    if last["l2t/ce"] <= RISE * lowest["l2t/ce"]:
        return []
    words = (
        f"held-out cross-entropy rose from {lowest['l2t/ce']:.3f} at step {lowest['step']:.0f} to {last['l2t/ce']:.3f}"
    )
    return [note("overfitting", words, "take an earlier checkpoint (logging.keep_every), more data, or model.dropout")]


def checkpoint_check(path: Path) -> Check:
    """Whether the newest checkpoint is whole; the others are looked at as far as their sizes."""
    directory = path / checkpoint_names.DIRECTORY
    steps = checkpoint_names.steps(directory)
    if not steps:
        return note("checkpoints", "none yet", "logging.save_freq or save_minutes say when")
    found = validate(directory / checkpoint_names.directory_name(steps[-1]))
    if isinstance(found, str) and checkpoint_names.steps(directory) == steps:
        older = f"; {len(steps) - 1} older ones" if len(steps) > 1 else "; there is no other"
        return trouble(
            "checkpoints", f"step {steps[-1]}: {found}{older}", "a start takes the newest whole one by itself"
        )
    return well("checkpoints", f"{len(steps)}, the newest of step {steps[-1]} is whole")


def room_needed(path: Path) -> int:
    """Bytes that a run's checkpoints take at most besides what is there: one more is written before one goes."""
    directory = path / checkpoint_names.DIRECTORY
    sizes = [
        sum(file.stat().st_size for file in (directory / checkpoint_names.directory_name(step)).glob("*"))
        for step in checkpoint_names.steps(directory)
    ]
    if not sizes:
        return 0
    try:
        keep = int(read_run(path).settings["logging.keep_last"])
    except UserError:
        keep = len(sizes)
    return max(sizes) * max(1, keep + 1 - len(sizes))
