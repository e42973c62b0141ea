"""Going on and starting from a trained model: with its statistics, on data of its kind, for longer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OPTIONS
from tiny_run import configured, tiny_run

from job import convert, evaluate, load, prepare
from job.data.shards import INFO_FILE, ShardDataset, shard_file
from job.errors import ExitCode, UserError
from job.model.weights import load_weights
from job.train import train
from job.trained import load_trained


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "demo", prepared)


@pytest.fixture(scope="module")
def moved(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts with statistics of another sample: means half a deviation off."""
    directory = tmp_path_factory.mktemp("moved") / "moved"
    shutil.copytree(prepared, directory)
    values = json.loads((directory / INFO_FILE).read_text())
    means = np.array(values["latent_mean"]) + 0.5 * np.array(values["latent_std"])
    (directory / INFO_FILE).write_text(json.dumps(values | {"latent_mean": means.tolist()}))
    return directory


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    capsys.readouterr()
    evaluate.main([*map(str, arguments), "--json"])
    values: dict[str, float] = json.loads(capsys.readouterr().out)
    return values


def test_other_statistics_change_no_figure(run: Path, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = json_of(capsys, run)
    evaluate.main([str(run), "--data", str(moved), "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == own
    assert "note: latents of" in printed.err
    assert "0.5 standard deviations" in printed.err


@pytest.mark.parametrize("origin", ["run", "checkpoint", "export", "weight file"])
def test_fine_tuning_keeps_the_statistics_of_its_origin(
    origin: str, run: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run if origin == "run" else run / "checkpoints" / "step_00000006"
    if origin in ("export", "weight file"):
        convert.main(["export", str(run), str(tmp_path / "export")])
        path = tmp_path / "export" / ("" if origin == "export" else "model.safetensors")
    # Nothing is learned at this rate, so the figures are the origin's.
    one_step = ("training.num_train_steps=1", "training.warmup_steps=0", "optimizer.lr=1e-12")
    tuned = tiny_run(tmp_path / "tuned", moved, f"training.init_from={path}", *one_step)
    assert "note: latents of" in capsys.readouterr().out
    before, after = load_trained(run), load_trained(tuned)
    assert after.description.latent_mean == before.description.latent_mean
    assert after.description.latent_std == before.description.latent_std
    for name, tensor in before.weights.items():
        torch.testing.assert_close(after.weights[name], tensor, atol=1e-6, rtol=0)
    np.testing.assert_allclose(load(tuned).encode(["A file."]), load(run).encode(["A file."]), atol=1e-5)
    figures = json.loads((tuned / "result.json").read_text())
    assert figures["t2l/x0_mse"] == pytest.approx(json_of(capsys, run)["t2l/x0_mse"], rel=1e-4)


def test_a_weight_file_that_does_not_say_takes_the_datas_statistics(
    run: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    weights = load_trained(run).weights
    save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "w.safetensors")
    tuned = tiny_run(tmp_path / "tuned", moved, f"training.init_from={tmp_path / 'w.safetensors'}")
    assert "does not say how its latents were standardized" in capsys.readouterr().out
    assert load_trained(tuned).description.latent_mean == ShardDataset(moved, "train").info.latent_mean


def test_data_of_another_tokenizer_or_encoder_is_refused(run: Path, corpus: Path, tmp_path: Path) -> None:
    options = dict(zip(OPTIONS[::2], OPTIONS[1::2], strict=True))
    for name, change, words in (
        ("words", {"--vocab-size": "290"}, "another tokenizer"),
        ("width", {"--latent-dim": "9"}, "latents of 9 dimensions"),
    ):
        changed = [word for pair in (options | change).items() for word in pair]
        assert prepare.main(["--out", str(tmp_path / name), "--source", str(corpus), *changed]) == 0
        with pytest.raises(UserError, match=words) as refused:
            evaluate.main([str(run), "--data", str(tmp_path / name)])
        assert str(tmp_path / name) in str(refused.value)
        assert str(run) in str(refused.value)
        with pytest.raises(UserError, match=words):
            train(configured(f"data.dir={tmp_path / name}", f"training.init_from={run}"), tmp_path / "tuned")
    with pytest.raises(UserError, match=r"data\.standardize_latents=false, but .* was trained with .*=true"):
        train(
            configured(f"data.dir={tmp_path / 'words'}", f"training.init_from={run}", "data.standardize_latents=false"),
            tmp_path / "tuned",
        )
    assert not list(tmp_path.glob("tuned/checkpoints/step_*"))


def test_new_texts_with_its_tokenizer_and_encoder_evaluate(
    run: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python -m job.prepare --like` makes them: other texts and statistics, the same tokenizer and encoder."""
    new = tmp_path / "new"
    shutil.copytree(prepared, new)
    values = json.loads((new / INFO_FILE).read_text())
    latents = np.load(new / shard_file("validation", 0, "latents"))
    values["latent_mean"] = latents.mean(0).tolist()
    values["latent_std"] = latents.std(0).tolist()
    (new / INFO_FILE).write_text(json.dumps(values))
    assert json_of(capsys, run, "--data", new) == json_of(capsys, run)


def test_a_finished_run_is_trained_further(
    run: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = tmp_path / "longer"
    shutil.copytree(run, longer)
    capsys.readouterr()
    assert train(configured(f"data.dir={prepared}", "training.num_train_steps=9"), longer) == ExitCode.FINISHED
    said = capsys.readouterr().out
    assert "training.num_train_steps raised from 6 to 9: the cosine schedule is stretched over all of them" in said
    assert "goes on at 0.00183 where it was 0.000439" in said
    assert [json.loads(line)["step"] for line in (longer / "training_log.jsonl").read_text().splitlines()][-1] == 9
    assert json.loads((longer / "result.json").read_text())["step"] == 9
    with pytest.raises(UserError, match=r"training\.num_train_steps: 9 -> 7"):  # what was trained cannot be taken back
        train(configured(f"data.dir={prepared}", "training.num_train_steps=7"), longer)


def test_a_run_that_goes_on_keeps_the_statistics_of_its_checkpoint(run: Path, moved: Path, tmp_path: Path) -> None:
    on = tmp_path / "on"
    shutil.copytree(run, on)
    config = configured(f"data.dir={moved}", "training.num_train_steps=7", "training.allow_changed=[data]")
    assert train(config, on) == ExitCode.FINISHED
    assert load_trained(on).description.latent_mean == load_trained(run).description.latent_mean


def test_the_header_of_exported_weights_says_what_they_are(run: Path, tmp_path: Path) -> None:
    convert.main(["export", str(run), str(tmp_path / "export")])
    weights, settings = load_weights(tmp_path / "export")
    assert settings["latent_dim"] == 8
    assert weights.keys() == load_trained(run).weights.keys()
