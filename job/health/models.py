"""What a path holds, a run, a model or a research checkpoint, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from job.checks import Check, trouble, well
from job.comparison.runs import CONFIG_FILE
from job.config import from_dict
from job.errors import UserError
from job.health.run import objective_checks, room_needed, run_checks
from job.health.system import disk_checks
from job.lgdlm.checkpoint import find_checkpoint
from job.lgdlm.traps import lgdlm_checks
from job.model.weights import WEIGHTS_FILE, load_weights
from job.trained import CONFIG_FILE as EXPORTED


def path_checks(path: Path) -> list[Check]:
    """The checks of whatever a path holds. UserError for what is nothing of ours."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; give a run, a model, or an LGDLM checkpoint")
    run = next((place for place in (path, *path.parents[:2]) if (place / CONFIG_FILE).is_file()), None)
    if run is not None:
        return [*run_checks(run), *disk_checks(run, room_needed(run))]
    if (path / EXPORTED).is_file():
        return exported_checks(path)
    if path.suffix == ".safetensors" or (path / WEIGHTS_FILE).is_file():
        return weight_checks(path)
    refuse_other_directory(path)
    return lgdlm_checks(path)


def refuse_other_directory(path: Path) -> None:
    """UserError for a directory that has none of the files by which we know one."""
    if not path.is_dir():
        return
    try:
        find_checkpoint(path)
    except UserError as error:
        raise UserError(
            f"{path}: neither a run ({CONFIG_FILE}), nor an exported model ({EXPORTED}, {WEIGHTS_FILE}), nor LGDLM "
            "checkpoints (checkpoint.pt, latest/checkpoint.pt, step_N.pt); give a directory of these, or a weight file"
        ) from error


def exported_checks(path: Path) -> list[Check]:
    """Those of an exported model: how it was trained, and its weights."""
    try:
        config = from_dict(json.loads((path / EXPORTED).read_text())["config"])
    except (OSError, ValueError, KeyError) as error:
        remedy = "export it again with `python -m job.convert export`"
        return [trouble("export", f"{path / EXPORTED}: damaged ({error})", remedy)]
    return [*objective_checks(config), *weight_checks(path)]


def weight_checks(path: Path) -> list[Check]:
    """Those of a weight file."""
    try:
        weights, settings = load_weights(path)
    except UserError as error:
        return [trouble("weights", str(error), "copy or export it again")]
    sizes = ", ".join(f"{name} {settings[name]}" for name in ("hidden_size", "n_blocks", "vocab_size", "latent_dim"))
    return [finite_check(weights, sizes)]


def finite_check(weights: Mapping[str, Tensor], words: str) -> Check:
    """Whether all weights are numbers."""
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        said = f"{len(broken)} tensors are not finite, such as {broken[0]}"
        return trouble("weights", said, "take an earlier checkpoint: these weights never recover")
    return well("weights", f"all finite; {words}")
