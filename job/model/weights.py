"""Weight files: safetensors with the model settings that their shapes mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from job.errors import UserError

WEIGHTS_FILE = "model.safetensors"  # of an exported directory
HEAD_DIM = 64  # of mmdit's attention unless it is told otherwise
NAMED = 3  # differing keys named in an error


def describe(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `model.*` settings that the shapes of a MultimodalMMDiT's weights tell.

    Shapes tell heads * head_dim only. Where there are query and key norms, these tell both; without, heads are taken to
    be HEAD_DIM wide. Raises UserError when a key is missing.
    """
    vocab_size, hidden_size = _shape(weights, "text_encoder.token_embed.weight")
    block = "mmdit.blocks.0"
    norm, streams = f"{block}.joint_attn.q_rmsnorms.0.gamma", f"{block}.attn_residual_fns.0.static_beta"
    if norm in weights:
        n_heads, _, head_dim = _shape(weights, norm)
    else:
        n_heads, head_dim = _shape(weights, f"{block}.joint_attn.to_out.0.weight")[1] // HEAD_DIM, HEAD_DIM
    return {
        "hidden_size": hidden_size,
        "n_blocks": len({key.split(".")[2] for key in weights if key.startswith("mmdit.blocks.")}),
        "n_heads": n_heads,
        "head_dim": head_dim,
        "cond_dim": _shape(weights, "conditioning.combine.2.weight")[0],
        "max_seq_len": _shape(weights, "text_encoder.position_embed")[1],
        "num_residual_streams": _shape(weights, streams)[0] if streams in weights else 1,
        "qk_rmsnorm": norm in weights,
        "latent_dim": _shape(weights, "latent_head.3.weight")[0],
        "vocab_size": vocab_size,
    }


def _shape(weights: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in weights:
        example = next(iter(weights), "none")
        raise UserError(
            f"not the weights of a MultimodalMMDiT: {key} is missing (found {len(weights)} others, such as {example})"
        )
    return tuple(weights[key].shape)


def overrides(settings: Mapping[str, Any]) -> str:
    """Settings as they are written on the command line."""
    return " ".join(f"model.{name}={str(value).lower()}" for name, value in settings.items())


def serialize(weights: Mapping[str, Tensor], **metadata: str) -> bytes:
    """Content of a weight file, with `describe(weights)` and `metadata` in its header."""
    # Tensors that share a storage, such as parts of a mapped file, are refused by safetensors.
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    return save(content, {"format": "pt", "model": json.dumps(describe(weights)), **metadata})


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (CPU) of a weight file and the model settings they mean.

    Raises UserError when the file is missing, damaged or something else.
    """
    path = path / WEIGHTS_FILE if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one with `python -m job.convert`") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: truncated, or not a safetensors file ({error}); write it with `python -m job.convert`"
        ) from error
    try:
        return weights, describe(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_header(path: Path) -> dict[str, str]:
    """The texts in a weight file's header, by name; among them what `serialize` was given as `metadata`."""
    with safe_open(path / WEIGHTS_FILE if path.is_dir() else path, framework="pt") as file:
        return file.metadata() or {}


def apply_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights that were read from `path` into a model.

    Raises UserError, with nothing copied, that names the settings or else the keys that differ.
    """
    own = model.state_dict()
    here, there = describe(own), describe(weights)
    different = {name: value for name, value in there.items() if value != here[name]}
    if different:
        differences = ", ".join(f"{name} is {value} there and {here[name]} here" for name, value in different.items())
        raise UserError(f"{path} does not fit this model: {differences}; use {overrides(different)}")
    problems = _differing_keys(own, weights)
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise UserError(f"{path} does not fit this model: {'; '.join(problems[:NAMED])}{more}")
    model.load_state_dict(weights)


def _differing_keys(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """What keeps `other` weights from being loaded into a model with its `own`, a few words a key."""
    problems = [f"{name} is missing there" for name in own if name not in other]
    problems += [f"{name} is unknown here" for name in other if name not in own]
    for name in own:
        if name not in other:
            continue
        there, here = list(other[name].shape), list(own[name].shape)
        if there != here:
            problems.append(f"{name} is {there} there and {here} here")
    return problems
