"""Checkpoints of the LGDLM research code, read without running any code they hold.

latest/checkpoint.pt            model_state_dict, optimizer_state_dict, state (a pickled TrainingState), config (None)
cycle_vae_impl/step_N.pt        model_state_dict, optimizer_state_dict, step, cfg, rng_torch, rng_cuda
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.errors import UserError
from job.files import write_whole
from job.model.weights import describe, overrides, serialize

PREFIXES = re.compile(r"^((module|_orig_mod|model)\.)+")  # of DDP, torch.compile and LGDLM's trainer
STATE_CLASS = "latentDLM_mmdit.checkpoints_mmdit.TrainingState"


class TrainingState:
    """Stands in for LGDLM's class of the same name, so that its pickled fields can be read without LGDLM."""


@dataclass(frozen=True)
class LgdlmCheckpoint:
    """Weights without the trainer's prefix, and the step they are from (None if the file does not say)."""

    path: Path
    weights: dict[str, Tensor]
    step: int | None


def find_checkpoint(source: Path) -> Path:
    """The checkpoint file that a path means.

    A file means itself; a directory its checkpoint.pt, its latest/checkpoint.pt, or its step_N.pt of the largest N.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"{source}: no such file or directory")
    for name in ("checkpoint.pt", "latest/checkpoint.pt"):
        if (source / name).is_file():
            return source / name
    steps: dict[int, Path] = {}
    for path in source.glob("step_*.pt"):
        if match := re.fullmatch(r"step_(\d+)", path.stem):
            steps[int(match[1])] = path
    if not steps:
        raise UserError(
            f"{source}: no LGDLM checkpoint here (looked for checkpoint.pt, latest/checkpoint.pt and step_N.pt)"
        )
    return steps[max(steps)]


def _load(path: Path) -> Any:
    """Content of a file of torch.save. UserError where reading it could run code, or where it is damaged."""
    try:
        # weights_only refuses every class but tensors and the few that are declared safe: a pickle can otherwise run
        # any code when it is read. LGDLM's state is a plain object, so an empty class of ours can take its fields.
        with torch.serialization.safe_globals([(TrainingState, STATE_CLASS)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = "its contents are not plain tensors"
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it holds {unsafe[1]}, which is not loaded since that could run code"
        raise UserError(
            f"{path}: cannot be read safely: {reason}; save model_state_dict alone and convert that"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: truncated, or not a checkpoint of torch.save ({str(error).splitlines()[0]}); copy it again"
        ) from error


def read_checkpoint(source: Path) -> LgdlmCheckpoint:
    """Weights and step of an LGDLM checkpoint file, or of the newest one in a directory. Else UserError in one line."""
    path = find_checkpoint(source)
    content = _load(path)
    weights = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(
            f"{path}: holds no model_state_dict, so it is not an LGDLM checkpoint; give checkpoint.pt or step_N.pt"
        )
    step = content.get("step", getattr(content.get("state"), "step", None))
    return LgdlmCheckpoint(path, {PREFIXES.sub("", name): tensor for name, tensor in weights.items()}, step)


def generation(weights: Mapping[str, Any]) -> str:
    """Which mmdit releases these keys belong to: 0.3, 0.2, or both when there is one residual stream.

    The parameters of the residual streams tell the two apart, and with one stream there are none.
    """
    names = {name.rsplit(".", 1)[-1] for name in weights if "_residual_fns." in name}
    if "h_post_scale" in names:
        return "0.3"
    return "0.2" if "dynamic_alpha_scale" in names else "0.2 or 0.3"


def check_generation(path: Path, weights: Mapping[str, Any]) -> None:
    """UserError for weights of mmdit 0.2 with several residual streams."""
    if generation(weights) == "0.2":
        raise UserError(
            f"{path}: weights of mmdit 0.2, whose hyper-connections (dynamic_alpha_scale, static_beta [streams]) "
            "compute something else than the manifold-constrained ones of mmdit 0.3 "
            "(h_post_scale, static_beta [streams, 1, 1]), so they cannot be loaded; "
            "only weights with one residual stream are common to both; see docs: how-to/come-from-lgdlm"
        )


def convert(source: Path, out: Path) -> str:
    """Write the weights of an LGDLM checkpoint to a file for training.init_from. Returns a summary."""
    if out.is_dir():
        raise UserError(f"{out} is a directory; name a file, such as {out / 'lgdlm.safetensors'}")
    found = read_checkpoint(source)
    check_generation(found.path, found.weights)
    try:
        settings = describe(found.weights)
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from error
    mmdit = generation(found.weights)
    content = serialize(found.weights, source=found.path.name, step=str(found.step), mmdit=mmdit)
    write_whole(out, lambda file: file.write(content))
    parameters = sum(tensor.numel() for tensor in found.weights.values())
    return (
        f"{out}: step {found.step} of {found.path}, {parameters / 1e6:.1f} M parameters, keys of mmdit {mmdit}\n"
        f"use it with: training.init_from={out} compat=lgdlm {overrides(settings)}"
    )
