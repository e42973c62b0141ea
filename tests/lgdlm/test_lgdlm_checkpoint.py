"""LGDLM checkpoints of both formats become weight files that a model takes whole, or one line says why not."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from job.config import ModelConfig
from job.errors import UserError
from job.lgdlm.checkpoint import check_generation, generation, read_checkpoint
from job.model.build import build_model
from job.model.weights import apply_weights, describe, load_weights, overrides, serialize

CONFIG = ModelConfig(hidden_size=16, n_blocks=2, n_heads=8, head_dim=64, cond_dim=12, max_seq_len=6, qk_rmsnorm=False)
VOCAB, DIM = 11, 5
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
# Parameter names and shapes of hyper_connections.HyperConnections(2, dim=16), which mmdit 0.2.2 builds.
OLD_STREAMS: dict[str, tuple[int, ...]] = {
    "static_alpha": (2, 3),
    "dynamic_alpha_fn": (16, 3),
    "dynamic_alpha_scale": (),
    "static_beta": (2,),
    "dynamic_beta_fn": (16,),
    "dynamic_beta_scale": (),
    "norm.gamma": (16,),
}


def weights(config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    return build_model(config, VOCAB, DIM, seed=1).state_dict()


def prefixed(prefix: str = "model.") -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights().items()}


def save_latest(path: Path) -> None:
    """The `latest/checkpoint.pt` form, with a pickled object of LGDLM's own class."""
    package, module = types.ModuleType("latentDLM_mmdit"), types.ModuleType("latentDLM_mmdit.checkpoints_mmdit")
    state_class = type("TrainingState", (), {"__module__": module.__name__})
    module.TrainingState = state_class  # type: ignore[attr-defined]
    state: Any = state_class()
    state.step, state.epoch = 137, 1
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.modules.update({package.__name__: package, module.__name__: module})
    try:
        torch.save(
            {"model_state_dict": prefixed(), "optimizer_state_dict": {"state": {}}, "state": state, "config": None},
            path,
        )
    finally:
        del sys.modules[package.__name__], sys.modules[module.__name__]


def save_step(path: Path, step: int, **extra: object) -> None:
    """The `step_N.pt` form."""
    torch.save(
        {
            "model_state_dict": prefixed(),
            "optimizer_state_dict": {},
            "step": step,
            "cfg": {"model": {}},
            "rng_torch": torch.get_rng_state(),
            "rng_cuda": None,
            **extra,
        },
        path,
    )


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_both_formats_give_the_weights_and_the_step(tmp_path: Path) -> None:
    save_latest(tmp_path / "run" / "latest" / "checkpoint.pt")
    for source in ("run", "run/latest", "run/latest/checkpoint.pt"):
        found = read_checkpoint(tmp_path / source)
        assert found.step == 137
        assert_equal(found.weights, weights())
    (tmp_path / "impl").mkdir()
    for step in (9, 100):
        save_step(tmp_path / "impl" / f"step_{step}.pt", step)
    found = read_checkpoint(tmp_path / "impl")
    assert found.step == 100  # the largest, not the last by name
    assert_equal(found.weights, weights())


@pytest.mark.parametrize("prefix", ["", "module.", "module.model.", "_orig_mod.model.", "module._orig_mod.model."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    torch.save({"model_state_dict": prefixed(prefix), "step": 1}, tmp_path / "step_1.pt")
    assert_equal(read_checkpoint(tmp_path).weights, weights())


class Intruder:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("intruded",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_step(tmp_path / "step_1.pt", 1, surprise=Intruder())
    with pytest.raises(UserError, match=r"step_1.pt: cannot be read safely: it holds (posix|nt).mkdir"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "intruded").exists()


def test_bad_files_are_named_in_one_line(tmp_path: Path) -> None:
    save_step(tmp_path / "whole.pt", 1)
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"rng": torch.get_rng_state()}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, reason in {
        "cut.pt": "truncated",
        "empty.pt": "truncated",
        "text.pt": "cannot be read|truncated",
        "other.pt": "model_state_dict",
        "list.pt": "model_state_dict",
        "absent.pt": "no such file",
        ".": "no LGDLM checkpoint here",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_generations_of_mmdit_are_told_apart() -> None:
    new = weights()
    without_streams = {name: tensor for name, tensor in new.items() if "residual_fns" not in name}
    old = without_streams | {
        f"mmdit.blocks.0.attn_residual_fns.0.{name}": torch.zeros(shape) for name, shape in OLD_STREAMS.items()
    }
    assert [generation(w) for w in (new, old, without_streams)] == ["0.3", "0.2", "0.2 or 0.3"]
    assert generation(weights(replace(CONFIG, num_residual_streams=1))) == "0.2 or 0.3"
    check_generation(Path("new.pt"), new)
    with pytest.raises(UserError, match=r"old.pt: weights of mmdit 0.2"):
        check_generation(Path("old.pt"), old)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, num_residual_streams=1),
        replace(CONFIG, num_residual_streams=4),
        replace(CONFIG, n_heads=3, head_dim=8, qk_rmsnorm=True, n_blocks=3),
        replace(CONFIG, n_heads=2),
    ],
)
def test_shapes_tell_the_settings(config: ModelConfig) -> None:
    settings = describe(weights(config))
    assert settings == {name: getattr(config, name) for name in settings} | {"vocab_size": VOCAB, "latent_dim": DIM}


def test_a_weight_file_comes_back_and_fits_only_its_model(tmp_path: Path) -> None:
    path = tmp_path / "lgdlm.safetensors"
    path.write_bytes(serialize(weights(), step="137"))
    loaded, settings = load_weights(path)
    assert_equal(loaded, weights())
    model = build_model(CONFIG, VOCAB, DIM, seed=2)
    apply_weights(model, loaded, path)
    assert_equal(model.state_dict(), weights())

    other = build_model(replace(CONFIG, hidden_size=24, n_blocks=1, qk_rmsnorm=True), VOCAB + 1, DIM, seed=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    needed = {name: settings[name] for name in ("hidden_size", "n_blocks", "qk_rmsnorm", "vocab_size")}
    with pytest.raises(UserError) as caught:
        apply_weights(other, loaded, path)
    assert str(caught.value).endswith(f"use {overrides(needed)}")
    assert "model.qk_rmsnorm=false" in str(caught.value)
    assert_equal(other.state_dict(), before)


def test_same_settings_with_other_keys_name_the_first_keys(tmp_path: Path) -> None:
    changed = {name: tensor for name, tensor in weights().items() if name != "text_head.bias"} | {
        "text_head.scale": torch.ones(1)
    }
    changed["mmdit.norms.0.g"] = torch.ones(3)
    differences = (
        r"text_head.bias is missing there; text_head.scale is unknown here; "
        r"mmdit.norms.0.g is \[3\] there and \[16\] here"
    )
    with pytest.raises(UserError, match=differences):
        apply_weights(build_model(CONFIG, VOCAB, DIM, seed=2), changed, tmp_path / "w.safetensors")


def test_damaged_or_foreign_weight_files_are_refused(tmp_path: Path) -> None:
    content = serialize(weights())
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    torch.save(weights(), tmp_path / "torch.pt")
    renamed = content.replace(b"text_encoder.token_embed", b"text_encoder.token_embad")
    (tmp_path / "foreign.safetensors").write_bytes(renamed)
    for name, reason in {
        "cut.safetensors": "truncated",
        "torch.pt": "not a safetensors file",
        "absent": "no such file",
        "foreign.safetensors": "text_encoder.token_embed.weight is missing",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            load_weights(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="shared/golden is not here")
@pytest.mark.parametrize("source", ["latest", "cycle_vae_impl"])
def test_golden_checkpoints_hold_the_golden_model(source: str) -> None:
    found = read_checkpoint(GOLDEN / "lgdlm_checkpoint" / source)
    assert found.step == 137
    assert_equal(found.weights, torch.load(GOLDEN / "cycle_vae_golden.pt", weights_only=True)["state_dict"])
