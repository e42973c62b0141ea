"""What is wrong with a checkpoint of the LGDLM research code, and the steps out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from job.checks import Check, note, trouble, well
from job.config import ModelConfig
from job.errors import UserError
from job.lgdlm.checkpoint import check_generation, generation, read_checkpoint
from job.model.build import build_model
from job.model.weights import describe

CONVERT = "python -m job.convert checkpoint {path} weights.safetensors"
PROBED = 16  # rows
COPIED = 0.9  # cosine of prediction and noise above which the head only hands its input on
UNREAD = 0.02  # of the prediction that changes with the text, below which the text is not read


def lgdlm_checks(source: Path) -> list[Check]:
    """All that can be said of a checkpoint: of its file, of its keys, and of what its encoder does."""
    try:
        found = read_checkpoint(source)
    except UserError as error:
        return [trouble("LGDLM file", str(error), "save model_state_dict alone with torch.save, and give that file")]
    checks = [
        well("LGDLM file", f"{found.path}: step {found.step}, {len(found.weights)} tensors, read without running code")
    ]
    try:
        check_generation(found.path, found.weights)
        settings = describe(found.weights)
    except UserError as error:
        remedy = "train anew; data can be kept (`python -m job.convert data`), and distil from the old model's texts"
        return [*checks, trouble("mmdit", str(error), remedy)]
    checks.append(well("mmdit", f"keys of mmdit {generation(found.weights)}"))
    broken = [name for name, tensor in found.weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        words = f"{len(broken)} tensors are not finite, such as {broken[0]}"
        return [*checks, trouble("weights", words, "take an earlier checkpoint: these weights never recover")]
    convert = CONVERT.format(path=found.path)
    return [*checks, *encoder_checks(found.weights, settings, convert), *habits(convert)]


def encoder_checks(weights: Mapping[str, Tensor], settings: Mapping[str, object], convert: str) -> list[Check]:
    """What T2L does at t=1, where generation starts: does it read the text, or copy the noise that it is given?"""
    copied, changed = probe(weights, settings)
    words = f"cosine of prediction and noise {copied:.3f}; another text changes {changed:.1%} of the prediction"
    remedy = (
        f"`{convert}`, then train with compat=lgdlm training.init_from=weights.safetensors and "
        "model.latent_parameterization=v_param loss.normalize_latent_loss=false: the decoder is kept, the latent head "
        "learns anew"
    )
    if copied > COPIED:
        return [trouble("degenerate epsilon", f"T2L hands on the noise that it is given ({words})", remedy)]
    if not changed >= UNREAD:  # also where a prediction of zero gives no share at all
        return [trouble("text not read", f"T2L gives nearly the same latent for every text ({words})", remedy)]
    return [well("T2L", words)]


@torch.no_grad()
def probe(weights: Mapping[str, Tensor], settings: Mapping[str, object]) -> tuple[float, float]:
    """Cosine of T2L's prediction with its noise, and the relative change with another text, over random texts at t=1.

    The model computes as LGDLM does: unscaled time, no norms of queries and keys but where the weights have them.
    """
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    known = {name: value for name, value in settings.items() if name in names}
    of_lgdlm: dict[str, Any] = {**known, "time_scale": 1.0, "implementation": "plain"}
    config = dataclasses.replace(ModelConfig(), **of_lgdlm)
    vocab_size, latent_dim = int(str(settings["vocab_size"])), int(str(settings["latent_dim"]))
    model = build_model(config, vocab_size, latent_dim, seed=0).eval()
    model.load_state_dict(dict(weights))
    generator = torch.Generator().manual_seed(0)
    length = min(16, config.max_seq_len)
    noise = torch.randn(PROBED, latent_dim, generator=generator)
    mask = torch.ones(PROBED, length, dtype=torch.bool)
    clean, noisy = torch.zeros(PROBED), torch.ones(PROBED)
    texts = torch.randint(vocab_size, (2, PROBED, length), generator=generator)
    predictions = [model(text, noise, clean, noisy, mask, heads=("latent",))[1] for text in texts]
    change = (predictions[0] - predictions[1]).norm(dim=-1) / predictions[0].norm(dim=-1)
    return float(cosine_similarity(predictions[0], noise, dim=-1).mean()), float(change.mean())


def habits(convert: str) -> list[Check]:
    """How LGDLM trains, whatever a checkpoint holds."""
    return [
        note(
            "unscaled time",
            "LGDLM embeds t in [0, 1] as it is: t=0 and t=1 look 97% the same to these weights",
            f"`{convert}`; load with compat=lgdlm. To train at many noise levels go on with model.time_scale=1000",
        ),
        note(
            "direction-only loss",
            "LGDLM's latent loss compares unit vectors: lengths of predicted latents mean nothing",
            "go on with loss.normalize_latent_loss=false",
        ),
        note(
            "heads",
            "LGDLM's n_heads is never read: its attention has 8 heads of 64, without norms of queries and keys",
            "compat=lgdlm sets that",
        ),
        note("padding", "LGDLM's cross-entropy counts padding", "go on with loss.ce_over_padding=false"),
    ]
