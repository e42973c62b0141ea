"""Every verdict on a run and on models, provoked."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from run_directories import run_directory
from safetensors.torch import save_file
from tiny_run import tiny_run

from job import convert
from job.checks import Check
from job.config import ModelConfig
from job.doctor import main
from job.errors import ExitCode, UserError
from job.health.models import path_checks
from job.health.run import embedding_cosine, room_needed
from job.model.build import build_model
from job.model.multimodal import TimestepEmbedder

GOOD = {
    "l2t/ce": 2.0,
    "l2t/latent_gain": 5.0,
    "t2l/text_gain": 0.5,
    "t2l/x0_mse": 0.4,
    "t2l/x0_norm_ratio": 0.95,
    "latent/active_dims": 8.0,
    "latent/active_dims_data": 10.0,
}
RUN = "checkpoints"


def lgdlm_weights() -> dict[str, torch.Tensor]:
    """Weights of a small model of LGDLM's shape."""
    shape = ModelConfig(hidden_size=32, n_blocks=1, cond_dim=32, max_seq_len=16, qk_rmsnorm=False, time_scale=1.0)
    model = build_model(shape, vocab_size=64, latent_dim=8, seed=0)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def verdicts(path: Path) -> dict[str, Check]:
    return {check.name: check for check in path_checks(path)}


def fake(path: Path, *overrides: str, evaluations: Mapping[int, Mapping[str, float]], **options: bool) -> Path:
    return run_directory(path, *overrides, evaluations=evaluations, **options)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    path = tmp_path_factory.mktemp("health") / "run"
    return tiny_run(path, prepared, "logging.save_freq=2", "logging.keep_last=2")


def test_a_run_that_is_well(tmp_path: Path) -> None:
    found = verdicts(fake(tmp_path / "run", evaluations={50: GOOD, 100: GOOD}))
    assert {name: check.state for name, check in found.items() if name not in ("clock", "disk speed")} == {
        "progress": "well",
        "objective": "well",
        "learning": "well",
        "checkpoints": "note",
        "room": "well",
        "file locks": "well",
    }


@pytest.mark.parametrize(
    ("overrides", "name", "state", "words"),
    [
        (
            ["model.latent_parameterization=epsilon", "loss.allow_degenerate_epsilon=true"],
            "degenerate epsilon",
            "trouble",
            "copying the input is perfect",
        ),
        (
            ["loss.normalize_latent_loss=true"],
            "direction-only loss",
            "trouble",
            "the length of a latent is not trained",
        ),
        (["model.time_scale=1", "loss.latent_t_mode=random"], "unscaled time", "trouble", "as 97% the same"),
        (["model.time_scale=1"], "unscaled time", "note", "this costs nothing yet"),
    ],
)
def test_traps_of_the_objective(
    overrides: list[str], name: str, state: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake(tmp_path / "run", *overrides, evaluations={100: GOOD})
    check = verdicts(run)[name]
    assert check.state == state
    assert words in check.words
    assert main([str(run)]) == (ExitCode.FAILED if state == "trouble" else ExitCode.FINISHED)


@pytest.mark.parametrize(
    ("last", "name", "state", "words"),
    [
        ({"l2t/latent_gain": 0.01}, "collapsed latent gain", "trouble", "it was 5 at step 50"),
        ({"t2l/text_gain": 0.001}, "collapsed text gain", "trouble", "it was 0.5 at step 50"),
        ({"l2t/latent_gain": float("nan")}, "collapsed latent gain", "trouble", "the decoder ignores the latent"),
        ({"t2l/x0_norm_ratio": 0.38}, "latent length", "trouble", "0.38 times as long"),
        ({"latent/active_dims": 1.0}, "latent directions", "note", "vary in 1 directions, the data's in 10"),
        ({"l2t/ce": 2.5}, "overfitting", "note", "rose from 2.000 at step 50 to 2.500"),
    ],
)
def test_what_evaluations_tell(last: dict[str, float], name: str, state: str, words: str, tmp_path: Path) -> None:
    check = verdicts(fake(tmp_path / "run", evaluations={50: GOOD, 100: GOOD | last}))[name]
    assert check.state == state
    assert words in check.words
    assert check.remedy


def test_latents_are_as_short_as_they_are_unsure(tmp_path: Path) -> None:
    """The mean of what a latent may be is shorter than each: that is no fault of the objective."""
    unsure = GOOD | {"t2l/x0_norm_ratio": 0.6, "t2l/x0_cos": 0.6}
    assert "latent length" not in verdicts(fake(tmp_path / "unsure", evaluations={100: unsure}))
    sure = verdicts(fake(tmp_path / "sure", evaluations={100: unsure | {"t2l/x0_cos": 0.95}}))
    assert sure["latent length"].state == "trouble"


def test_a_direction_that_has_not_begun_to_learn(tmp_path: Path) -> None:
    blind = GOOD | {"l2t/latent_gain": 0.0}
    early = verdicts(fake(tmp_path / "early", evaluations={5: blind}, finished=False))["collapsed latent gain"]
    late = verdicts(fake(tmp_path / "late", evaluations={90: blind}, finished=False))["collapsed latent gain"]
    assert (early.state, late.state) == ("note", "trouble")
    none = verdicts(fake(tmp_path / "none", evaluations={}, finished=False))["learning"]
    assert (none.state, none.words) == ("note", "no evaluation yet: nothing is known of what it learns")


def test_only_the_direction_that_is_trained_is_judged(tmp_path: Path) -> None:
    blind = GOOD | {"l2t/latent_gain": 0.0, "t2l/text_gain": 0.0, "t2l/x0_norm_ratio": 0.1}
    for kind, expected in {
        "t2l": {"collapsed text gain", "latent length"},
        "l2t": {"collapsed latent gain"},
        "unconditional": set(),
    }.items():
        found = verdicts(fake(tmp_path / kind, f"loss.loss_type={kind}", evaluations={100: blind}))
        assert {name for name, check in found.items() if check.state == "trouble"} == expected


def test_a_directory_of_nothing_that_is_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"neither a run \(config\.yaml\), nor an exported model .*; give a directory of"
    ):
        path_checks(tmp_path)


def test_progress(tmp_path: Path) -> None:
    run = fake(tmp_path / "run", evaluations={50: GOOD}, finished=False)
    assert verdicts(run)["progress"].words == "step 50 of 100"
    log = run / "training_log.jsonl"
    os.utime(log, (time.time() - 3600,) * 2)
    assert "not a word for 60 min" in verdicts(run)["progress"].words
    log.write_text(json.dumps({"step": 50, "loss": 1.0, "nonfinite_steps": 3}) + "\n")
    check = verdicts(run)["progress"]
    assert (check.state, check.words) == ("trouble", "step 50 of 100; 3 updates were skipped, not finite")


def test_checkpoints_and_their_room(real: Path, tmp_path: Path) -> None:
    run = shutil.copytree(real, tmp_path / "run")
    assert verdicts(run)["checkpoints"].words == "2, the newest of step 6 is whole"
    newest = run / RUN / "step_00000006"
    size = sum(path.stat().st_size for path in newest.iterdir())
    assert room_needed(run) == pytest.approx(size, rel=0.01)  # both that are kept are there
    share = next(newest.glob("share_*"))
    content = bytearray(share.read_bytes())
    content[-1] ^= 1
    share.write_bytes(content)
    check = verdicts(run)["checkpoints"]
    assert check.state == "trouble"
    assert "SHA-256 differs" in check.words
    assert "1 older ones" in check.words


def test_time_is_embedded_as_the_model_does() -> None:
    for scale in (1.0, 1000.0):
        embedder = TimestepEmbedder(8, scale)
        angles = scale * torch.tensor([0.0, 1.0])[:, None] * embedder.frequencies
        embedded = torch.cat([angles.cos(), angles.sin()], dim=-1)
        alike = torch.cosine_similarity(embedded[0], embedded[1], dim=0)
        assert embedding_cosine(scale) == pytest.approx(float(alike), abs=1e-5)


def test_exported_models_and_weight_files(real: Path, tmp_path: Path) -> None:
    convert.main(["export", str(real), str(tmp_path / "model")])
    found = verdicts(tmp_path / "model")
    assert {name: check.state for name, check in found.items()} == {"objective": "well", "weights": "well"}
    from job.model.weights import load_weights

    weights = load_weights(tmp_path / "model")[0]
    weights["text_head.bias"][0] = float("nan")
    save_file(weights, tmp_path / "broken.safetensors")
    check = verdicts(tmp_path / "broken.safetensors")["weights"]
    assert check.words == "1 tensors are not finite, such as text_head.bias"
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "broken.safetensors").read_bytes()[:99])
    assert verdicts(tmp_path / "cut.safetensors")["weights"].state == "trouble"
    (tmp_path / "model" / "config.json").write_text("{")
    assert verdicts(tmp_path / "model")["export"].state == "trouble"


def test_research_checkpoints(tmp_path: Path) -> None:
    weights = lgdlm_weights()
    path = tmp_path / "step_7.pt"

    def saved(tensors: Mapping[str, object]) -> dict[str, Check]:
        torch.save({"model_state_dict": {f"model.{name}": t for name, t in tensors.items()}, "step": 7}, path)
        return verdicts(path)

    found = saved(weights)
    assert found["LGDLM file"].state == found["mmdit"].state == found["T2L"].state == "well"
    assert {found[name].state for name in ("unscaled time", "direction-only loss", "heads", "padding")} == {"note"}
    # A latent head without weights gives one latent for all texts.
    blind = saved(weights | {"latent_head.3.weight": 0 * weights["latent_head.3.weight"]})
    assert blind["text not read"].state == "trouble"
    broken = saved(weights | {"text_head.bias": weights["text_head.bias"] * float("inf")})
    assert broken["weights"].words == "1 tensors are not finite, such as text_head.bias"
    older = {name.replace("h_post_scale", "dynamic_alpha_scale"): tensor for name, tensor in weights.items()}
    assert "weights of mmdit 0.2" in saved(older)["mmdit"].words
    path.write_bytes(path.read_bytes()[:500])
    assert verdicts(path)["LGDLM file"].state == "trouble"


def test_an_encoder_that_copies_its_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That training leads there takes minutes; the figures are those of facts that were measured."""
    from job.lgdlm import traps

    monkeypatch.setattr(traps, "probe", lambda *_: (0.998, 0.006))
    torch.save({"model_state_dict": lgdlm_weights(), "step": 7}, tmp_path / "step_7.pt")
    check = verdicts(tmp_path / "step_7.pt")["degenerate epsilon"]
    assert check.state == "trouble"
    assert "cosine of prediction and noise 0.998; another text changes 0.6%" in check.words


def test_the_probe_measures_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that returns its latents copies them; one that reads texts changes with them."""
    from job.lgdlm import traps
    from job.model.weights import describe

    weights = lgdlm_weights()

    class Copies(torch.nn.Module):
        def forward(
            self, texts: torch.Tensor, latents: torch.Tensor, *_: object, **__: object
        ) -> tuple[None, torch.Tensor]:
            return None, 2 * latents

        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    assert traps.probe(weights, describe(weights))[1] > 0.02
    monkeypatch.setattr(traps, "build_model", lambda *_, **__: Copies())
    copied, changed = traps.probe(weights, describe(weights))
    assert copied == pytest.approx(1, abs=1e-5)
    assert changed == 0
