"""The model: what its configuration changes, and what building it leaves alone."""

from __future__ import annotations

import random
from importlib import metadata
from typing import Any

import pytest
import torch

from job.config import ModelConfig
from job.errors import UserError
from job.model.backbone import NEEDED, check_packages
from job.model.build import build_model
from job.model.multimodal import MultimodalMMDiT, TimestepEmbedder


def small(seed: int = 0, **changes: Any) -> MultimodalMMDiT:
    config = ModelConfig(
        **{"hidden_size": 32, "n_blocks": 2, "n_heads": 2, "head_dim": 16, "cond_dim": 32, "max_seq_len": 8, **changes}
    )
    return build_model(config, 61, 8, seed)


def call(model: MultimodalMMDiT, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "text_tokens": torch.randint(4, 61, (2, 6), generator=generator),
        "latents": torch.randn(2, 8, generator=generator),
        "text_timesteps": torch.tensor([0.0, 0.5]),
        "latent_timesteps": torch.tensor([1.0, 0.2]),
        "attention_mask": torch.ones(2, 6, dtype=torch.bool),
    }
    text, latent = model(**{**inputs, **changes})
    return text.detach(), latent.detach()


def test_shapes_and_heads() -> None:
    model = small()
    text, latent = call(model)
    assert text.shape == (2, 6, 61)
    assert latent.shape == (2, 8)
    tokens, latents, t, mask = (
        torch.zeros(1, 3, dtype=torch.long),
        torch.zeros(1, 8),
        torch.zeros(1),
        torch.ones(1, 3, dtype=torch.bool),
    )
    assert model(tokens, latents, t, t, mask, heads=("latent",))[0] is None
    assert model(tokens, latents, t, t, mask, heads=("text",))[1] is None


@pytest.mark.parametrize(
    "changes", [{"qk_rmsnorm": False}, {"n_heads": 4, "head_dim": 8}, {"time_scale": 1.0}, {"num_residual_streams": 4}]
)
def test_a_setting_changes_the_output(changes: dict[str, Any]) -> None:
    def wake(model: MultimodalMMDiT) -> MultimodalMMDiT:
        # a new model is blind to time, and its streams are copies of one another
        generator = torch.Generator().manual_seed(0)
        for p in model.mmdit.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
        return model

    assert not torch.allclose(call(wake(small()))[0], call(wake(small(**changes)))[0], atol=1e-4)


def test_qk_norm_has_parameters_and_heads_have_sizes() -> None:
    names = {name for name, _ in small().named_parameters()}
    without = {name for name, _ in small(qk_rmsnorm=False).named_parameters()}
    assert names - without == {
        f"mmdit.blocks.{b}.joint_attn.{k}_rmsnorms.{m}.gamma" for b in (0, 1) for k in "qk" for m in (0, 1)
    }
    assert small(n_heads=4).state_dict()["mmdit.blocks.0.joint_attn.to_qkv.0.weight"].shape == (3 * 4 * 16, 32)


def test_dropout_reaches_feed_forwards_and_latent_head() -> None:
    rates = {
        name: module.p for name, module in small(dropout=0.3).named_modules() if isinstance(module, torch.nn.Dropout)
    }
    assert {name for name, p in rates.items() if p == 0.3} >= {
        "latent_head.2",
        *(f"mmdit.blocks.{b}.feedforwards.{m}.ff.1" for b in (0, 1) for m in (0, 1)),
    }


def test_building_is_deterministic_and_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(7)
    random.seed(7)
    state, python_state = torch.get_rng_state(), random.getstate()
    model = small(seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert random.getstate() == python_state
    torch.manual_seed(8)
    random.seed(8)
    again, other = small(seed=3).state_dict(), small(seed=4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


def test_timesteps_stay_float32_under_autocast() -> None:
    embedder = TimestepEmbedder(32, scale=1000.0)
    angles: list[torch.Tensor] = []
    embedder.mlp[0].register_forward_pre_hook(lambda module, args: angles.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        embedder(torch.linspace(0, 1, 1000))
    assert angles[0].dtype == torch.float32
    assert len(angles[0].unique(dim=0)) == 1000


def test_padding_does_not_reach_real_tokens() -> None:
    model = small()
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    tokens = torch.randint(4, 61, (2, 6), generator=torch.Generator().manual_seed(1))
    text, latent = call(model, text_tokens=tokens, attention_mask=mask)
    other_text, other_latent = call(model, text_tokens=torch.where(mask, tokens, 5), attention_mask=mask)
    torch.testing.assert_close(text[mask], other_text[mask])
    torch.testing.assert_close(latent, other_latent)


@pytest.mark.parametrize("found", ["0.2.2", None])
def test_another_release_of_the_blocks_is_refused(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found if name == "mmdit" else NEEDED[name]

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(UserError, match=r"mmdit 0\.3\.0 is needed, found: .*pip install mmdit==0\.3\.0"):
        check_packages()
