"""The commands around a trained model: convert, export, evaluate and sample, on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from job import convert, evaluate, export, sample
from job.config import Config, DataConfig, LoggingConfig, LossConfig, ModelConfig, TrainingConfig
from job.data.loader import open_datasets
from job.data.shards import ShardDataset, Split
from job.errors import ExitCode, UsageError, UserError
from job.model.build import build_model
from job.model.weights import apply_weights, load_weights
from job.runtime.checkpointer import Checkpointer
from job.runtime.distributed import Process
from job.runtime.resume import record
from job.trained import load_trained

MODEL = ModelConfig(hidden_size=16, n_blocks=1, n_heads=2, head_dim=8, cond_dim=16, max_seq_len=8)
VOCAB, DIM = 64, 6


def save_run(run: Path, config: Config, average: bool) -> None:
    """A run directory as training leaves it, with checkpoints of steps 1 and 2 (seeds 1 and 2; averages 11 and 12)."""
    process = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), node="here")
    checkpointer = Checkpointer(run / "checkpoints", process, keep_last=2, keep_every=0)
    for step in (1, 2):
        model, averaged = (build_model(config.model, VOCAB, DIM, seed) for seed in (step, step + 10))
        tensors = {
            "model": model.state_dict(),
            "optimizer": {"average": dict(averaged.named_parameters()) if average else {}},
        }
        checkpointer.save(step, tensors, record(step, config, "fingerprint", 8), blocking=True)
        assert checkpointer.wait()


@pytest.fixture
def config() -> Config:
    data = DataConfig(source="synthetic", synthetic_samples=64, synthetic_vocab_size=VOCAB, synthetic_latent_dim=DIM)
    return Config(
        data=data, model=MODEL, training=TrainingConfig(eval_batch_size=4), logging=LoggingConfig(num_eval_batches=2)
    )


@pytest.fixture
def run(tmp_path: Path, config: Config) -> Path:
    save_run(tmp_path / "run", config, average=False)
    return tmp_path / "run"


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    return build_model(MODEL, VOCAB, DIM, seed).state_dict()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def printed(capsys: pytest.CaptureFixture[str], command: Any, *arguments: object) -> str:
    capsys.readouterr()
    command.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_run_checkpoint_and_average_are_found(tmp_path: Path, run: Path, config: Config) -> None:
    assert same(load_trained(run).weights, weights_of(2))
    assert same(load_trained(run / "checkpoints" / "step_00000001").weights, weights_of(1))
    with pytest.raises(UserError, match="no moving average"):
        load_trained(run, average=True)
    save_run(tmp_path / "averaged", config, average=True)
    assert same(load_trained(tmp_path / "averaged").weights, weights_of(12))  # what training evaluates
    assert same(load_trained(tmp_path / "averaged", average=False).weights, weights_of(2))


def test_an_exported_model_is_the_same_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, convert, "export", run, tmp_path / "out")
    files = ["README.md", "config.json", "model.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    from_run, from_export = (json.loads(printed(capsys, evaluate, path, "--json")) for path in (run, tmp_path / "out"))
    assert from_export == from_run
    assert from_run["step"] == 2
    assert from_run["samples"] == 8  # num_eval_batches x eval_batch_size
    assert printed(capsys, sample, tmp_path / "out", "--count", 2) == printed(capsys, sample, run, "--count", 2)
    fresh = build_model(MODEL, VOCAB, DIM, seed=5)
    apply_weights(fresh, load_weights(tmp_path / "out")[0], tmp_path / "out")  # training.init_from takes it too
    assert same(fresh.state_dict(), weights_of(2))
    with pytest.raises(UserError, match="exists already"):
        convert.main(["export", str(run), str(tmp_path / "out")])


def test_the_model_card_is_one_that_the_hub_reads(run: Path, config: Config, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    figures = {"step": 2, "l2t/latent_gain": 0.7, "t2l/text_gain": 0.5, "t2l/x0_mse": 1.0, "t2l/x0_cos": 0.6}
    figures |= {"t2l2t/token_acc": 0.1, "text/most_frequent_token_acc": 0.05, "samples": 8, "tokens": 50}
    (run / "evaluation.jsonl").write_text(json.dumps({"step": 0}) + "\n" + json.dumps(figures) + "\n")
    convert.main(["export", str(run), str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "cyclevae"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["l2t/latent_gain"] == 0.7
    for words in (
        'load("out")',
        "model.encode_ids([[5, 6, 7]])",  # its data came without a tokenizer
        "| latents | 6 dimensions |",
        "| model.hidden_size | 16 |",
        "| torch |",
        "loss_type=cycle_vae",
    ):
        assert words in card.text
    assert "the decoder uses the latent" in card.text  # the table of the evaluation with its verdicts
    convert.main(["export", str(tmp_path / "out"), str(tmp_path / "again")])
    again = ModelCard.load(tmp_path / "again" / "README.md")
    named = ("out", "again")
    lines, lines_again = ([t for t in c.text.splitlines() if not any(n in t for n in named)] for c in (card, again))
    assert lines == lines_again
    convert.main(["export", str(run / "checkpoints" / "step_00000001"), str(tmp_path / "first")])
    assert "The run did not evaluate these weights." in (tmp_path / "first" / "README.md").read_text()


def test_a_dry_push_lists_what_would_be_sent(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    called: list[tuple[str, object]] = []

    class Hub:
        def create_repo(self, repository: str, private: bool | None, exist_ok: bool) -> None:
            called.append((repository, private))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            called.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    files = ["README.md", "config.json", "model.json", "model.safetensors"]
    words = printed(capsys, convert, "export", run, tmp_path / "out", "--push-to", "me/texts", "--dry-run")
    assert "me/texts: would be sent" in words
    assert [line.split()[-1] for line in words.splitlines()[-4:]] == files
    assert called == []
    words = printed(capsys, convert, "export", run, tmp_path / "sent", "--push-to", "me/texts", "--private")
    assert "me/texts: sent" in words
    assert called == [("me/texts", True), ("me/texts", files)]
    with pytest.raises(UserError, match="--push-to no/such/name: "):
        convert.main(["export", str(run), str(tmp_path / "bad"), "--push-to", "no/such/name", "--dry-run"])
    assert not (tmp_path / "bad").exists()
    with pytest.raises(UsageError, match="--dry-run and --private have no effect without --push-to"):
        convert.main(["export", str(run), str(tmp_path / "other"), "--dry-run"])


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert.main(["export", str(run), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_not_there_is_named(run: Path, tmp_path: Path, config: Config) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such directory"):
        load_trained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"commit.json is missing"):
        load_trained(tmp_path)
    config.data = DataConfig(dir=str(tmp_path / "moved"))
    save_run(tmp_path / "other", config, average=False)
    with pytest.raises(UserError, match=r"moved: the run's data directory is not here; name it with --data"):
        load_trained(tmp_path / "other")
    with pytest.raises(UserError, match="texts need a tokenizer, and the data came without one; use encode_ids"):
        sample.main([str(run), "--text", "hello"])
    with pytest.raises(UserError, match="never trained on noise"):
        sample.main([str(run), "--unconditional"])
    for arguments in (["--steps", "0"], ["--unconditional", "--text", "hello"]):
        with pytest.raises(UsageError):
            sample.main([str(run), *arguments])


def test_texts_from_noise(tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config.loss = LossConfig(loss_type="unconditional")
    save_run(tmp_path / "run", config, average=False)
    validation = open_datasets(config)[1]
    texts = (
        printed(capsys, sample, tmp_path / "run", "--unconditional", "--count", 3, "--steps", 4).strip().splitlines()
    )
    assert [len(text.split()) for text in texts] == validation.lengths(np.arange(3)).tolist()
    assert str(validation.info.mask_token_id) not in " ".join(texts).split()


def test_lgdlm_checkpoint_to_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(
        {"model_state_dict": {f"model.{name}": tensor for name, tensor in weights_of(3).items()}, "step": 5},
        tmp_path / "step_5.pt",
    )
    words = printed(capsys, convert, "checkpoint", tmp_path, tmp_path / "w.safetensors")
    assert "step 5" in words
    assert "keys of mmdit 0.3" in words
    assert "model.hidden_size=16" in words
    model = build_model(MODEL, VOCAB, DIM, seed=4)
    apply_weights(model, load_weights(tmp_path / "w.safetensors")[0], tmp_path)
    assert same(model.state_dict(), weights_of(3))
    with pytest.raises(UserError, match="is a directory"):
        convert.main(["checkpoint", str(tmp_path), str(tmp_path)])


def test_weights_of_another_mmdit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    old = {name.replace("h_post_scale", "dynamic_alpha_scale"): tensor for name, tensor in weights_of(3).items()}
    torch.save({"model_state_dict": old}, tmp_path / "step_5.pt")
    with pytest.raises(UserError, match=r"mmdit 0\.2"):
        convert.main(["checkpoint", str(tmp_path), str(tmp_path / "w.safetensors")])
    assert not (tmp_path / "w.safetensors").exists()


def test_lgdlm_data_to_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tokens", "latents"):
        (tmp_path / name).mkdir()
    for number in range(20):
        np.savez(
            tmp_path / "tokens" / f"{number}_tokens.npz",
            input_ids=np.full(4, number + 2),
            attention_mask=np.arange(4) < 3,
        )
        np.save(tmp_path / "latents" / f"{number}.npy", np.full(DIM, number, np.float32))
    (tmp_path / "latents" / "5.npy").unlink()
    command = ["data", tmp_path / "tokens", tmp_path / "latents", tmp_path / "out"]
    ids = ["--mask-token-id", 1, "--pad-token-id", 0, "--vocab-size", 30, "--validation-fraction", 0.4]
    with pytest.raises(UsageError, match="--mask-token-id"):
        printed(capsys, convert, *command)
    with pytest.raises(UserError, match="1 unpaired or corrupt"):
        printed(capsys, convert, *command, *ids)
    printed(capsys, convert, *command, *ids, "--skip-bad")
    splits = [ShardDataset(tmp_path / "out", split) for split in get_args(Split)]
    samples = [split[index] for split in splits for index in range(len(split))]
    assert len(samples) == 19
    assert all(tokens.tolist() == [latent[0] + 2] * 3 for tokens, latent in samples)


def test_a_number_of_samples_and_texts_of_ones_own_are_not_given_together(run: Path) -> None:
    with pytest.raises(UsageError, match=r"^--count 3 has no effect with --text"):
        sample.main([str(run), "--text", "a text", "--count", "3"])


def test_a_bad_command_line_exits_2() -> None:
    for command in (convert, evaluate, sample):
        with pytest.raises(SystemExit) as caught:
            command.main(["--nonsense"])
        assert caught.value.code == ExitCode.USAGE
