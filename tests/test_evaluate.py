"""`cyclevae evaluate`: all checkpoints, runs that are training, people's scores, and the encoder as a judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_run
from torch import Tensor

from job import checkpoint_series, evaluate, load, trained
from job.checkpoint_names import directory_name
from job.command import guarded
from job.runtime.checkpoint import Checkpoint, remove
from job.similarity import cosines, nearest_is_own, rank_correlation, re_encoded, read_pairs

SMALL = ["--num-samples", "8", "--device", "cpu"]
PAIRS = [
    ("the parser reads the first line.", "the parser reads the first line.", 5),
    ("the parser reads the first line.", "the parser reads a new file.", 3),
    ("a client closes each value.", "the cache sorts all the names.", 0),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """Six steps, a checkpoint every two."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    return tiny_run(path, prepared, "logging.save_freq=2", "logging.keep_last=9", "optimizer.lr=0.02")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The run with its checkpoints at 2 and 4 alone, to be changed."""
    path = shutil.copytree(run, tmp_path / "copied")
    shutil.rmtree(path / "checkpoints" / directory_name(6))
    return path


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, float]]:
    capsys.readouterr()
    evaluate.main([*map(str, arguments), *SMALL, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_checkpoint_has_the_figures_that_it_has_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = figures(capsys, run, "--every")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert len({line["l2t/ce"] for line in lines}) == 3
    (alone,) = figures(capsys, run / "checkpoints" / directory_name(4))
    assert lines[1] == alone
    evaluate.main([str(run), "--every", *SMALL])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["step", "2", "4", "6"]
    assert f"{alone['l2t/ce']:.4g}" in table[2].split()


def test_a_checkpoint_that_vanishes_while_it_is_read_is_passed_over(
    run: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run does that is training: it saves another one and removes the oldest."""
    read = checkpoint_series.weights_of

    def while_training(checkpoint: Checkpoint, average: bool | None) -> tuple[dict[str, Tensor], bool]:
        if checkpoint.step == 2:
            shutil.copytree(run / "checkpoints" / directory_name(6), copied / "checkpoints" / directory_name(6))
            remove(checkpoint.path)
        return read(checkpoint, average)

    monkeypatch.setattr(checkpoint_series, "weights_of", while_training)
    assert [line["step"] for line in figures(capsys, copied, "--every")] == [4, 6]


def test_a_run_that_is_training_is_evaluated_at_its_next_checkpoint(
    run: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest one is removed between its hashing and its reading; nothing is written, and nothing locked."""
    read = trained.weights_of

    def while_training(checkpoint: Checkpoint, average: bool | None) -> tuple[dict[str, Tensor], bool]:
        if checkpoint.step == 4:
            shutil.copytree(run / "checkpoints" / directory_name(6), copied / "checkpoints" / directory_name(6))
            for step in (2, 4):
                remove(copied / "checkpoints" / directory_name(step))
        return read(checkpoint, average)

    monkeypatch.setattr(trained, "weights_of", while_training)
    before = sorted(path for path in copied.rglob("*") if "checkpoints" not in path.parts)
    (line,) = figures(capsys, copied)
    assert line["step"] == 6
    assert sorted(path for path in copied.rglob("*") if "checkpoints" not in path.parts) == before


def test_all_checkpoints_that_were_listed_may_be_gone_when_they_are_looked_at(
    run: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.runtime import checkpoint

    check = checkpoint.validate

    def while_training(path: Path) -> Checkpoint | str:
        if not (copied / "checkpoints" / directory_name(6)).exists():
            shutil.copytree(run / "checkpoints" / directory_name(6), copied / "checkpoints" / directory_name(6))
            for step in (2, 4):
                remove(copied / "checkpoints" / directory_name(step))
        return check(path)

    monkeypatch.setattr(checkpoint, "validate", while_training)
    assert checkpoint.open_checkpoint(copied).step == 6


def test_a_named_checkpoint_that_vanishes_is_one_line(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "checkpoints" / directory_name(2)

    def while_training(checkpoint: Checkpoint, average: bool | None) -> tuple[dict[str, Tensor], bool]:
        remove(path)
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(trained, "weights_of", while_training)
    assert guarded(lambda: evaluate.main([str(path), *SMALL])) == 1
    assert "removed while it was read; give the run's directory instead" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_left_out(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = next((copied / "checkpoints" / directory_name(2)).glob("share_*"))
    share.write_bytes(share.read_bytes()[:-1])
    capsys.readouterr()
    evaluate.main([str(copied), "--every", "--json", *SMALL])
    told = capsys.readouterr()
    assert [json.loads(line)["step"] for line in told.out.splitlines()] == [4]
    assert f"note: {copied / 'checkpoints' / directory_name(2)} is left out: {share.name} has" in told.err


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_scores_of_pairs(run: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"pairs{suffix}"
    mark = {".csv": ",", ".tsv": "\t"}.get(suffix, "")
    if mark:
        path.write_text("\n".join(mark.join(map(str, row)) for row in [("sentence1", "sentence2", "score"), *PAIRS]))
    else:
        rows = [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in PAIRS]
        path.write_text("\n".join(map(json.dumps, rows)))
    assert [(pair.first, pair.second, pair.score) for pair in read_pairs(path)] == PAIRS
    (found,) = figures(capsys, run, "--sts", path)
    assert found["pairs"] == 3
    model = load(run, device="cpu")
    alike = cosines(model.encode([first for first, _, _ in PAIRS]), model.encode([second for _, second, _ in PAIRS]))
    assert alike[0] == pytest.approx(1)
    expected = {(0, 1, 2): -1.0, (2, 1, 0): 1.0, (2, 0, 1): 0.5, (1, 2, 0): 0.5, (0, 2, 1): -0.5, (1, 0, 2): -0.5}
    assert found["sts/spearman"] == pytest.approx(expected[tuple(np.argsort(np.argsort(alike)))])
    assert found["sts/spearman_encoder"] == pytest.approx(1)  # what these pairs were written for


def test_the_encoder_alone_is_no_condition(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(run, device="cpu")
    assert model.tokenizer  # found beside the model
    model.trained.directories = [tmp_path]
    assert rank_correlation(model, read_pairs(_written(tmp_path)), 8).keys() == {"pairs", "sts/spearman"}


def _written(directory: Path) -> Path:
    path = directory / "pairs.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in [("sentence1", "sentence2", "score"), *PAIRS]))
    return path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "x", "give a .jsonl, .csv or .tsv"),
        ("a.jsonl", "{", "line 1 is no JSON object"),
        ("a.csv", "sentence1,sentence2\na,b\n", "pair 1 has no score"),
        ("a.csv", "sentence1,sentence2,score\na,b,high\n", "pair 1: could not convert"),
        ("a.csv", "sentence1,sentence2,score\na,b,nan\n", "is no number to rank"),
        ("a.csv", "sentence1,sentence2,score\na,b,1\na,c,1\na,d,1\n", "a rank correlation needs three"),
        ("missing.csv", None, "cannot be read"),
    ],
)
def test_pairs_that_cannot_be_ranked_are_one_line(
    run: Path, tmp_path: Path, name: str, content: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert guarded(lambda: evaluate.main([str(run), "--sts", str(tmp_path / name)])) == 1
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1


def test_the_source_encoder_judges_the_round_trip(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = figures(capsys, run, "--re-encode")
    assert found["re_encoded"] == 8
    # Tokens lose nothing of these texts; a model of six steps loses nearly all.
    assert found["text/re_encoded_cos"] == pytest.approx(1, abs=1e-4)
    assert found["text/re_encoded_at_1"] == 1
    assert found["t2l2t/re_encoded_cos"] < 0.9
    evaluate.main([str(run), "--re-encode", *SMALL])
    assert "decoded from the latent predicted from it" in capsys.readouterr().out


def test_a_perfect_decoder_is_told_so_by_the_encoder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(run, device="cpu")
    rows = [np.asarray(model.trained.held_out[index][0], np.int64) for index in range(8)]
    monkeypatch.setattr(model, "decode_ids", lambda *_, **__: rows)
    found = re_encoded(model, 8, 8)
    assert found["t2l2t/re_encoded_cos"] == found["text/re_encoded_cos"]
    assert found["t2l2t/re_encoded_at_1"] == 1


def test_nearest_is_own() -> None:
    true = np.eye(3, dtype=np.float32)
    assert nearest_is_own(true, true) == 1
    assert nearest_is_own(np.roll(true, 1, axis=0), true) == 0
    assert nearest_is_own(np.ones((3, 3), np.float32), true) == pytest.approx(1 / 3)


@pytest.mark.parametrize("words", ["--every --passes 1", "--every --sts x", "--sts x --re-encode"])
def test_two_things_instead_of_the_table_are_refused(run: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: evaluate.main([str(run), *words.split()])) == 2
    assert "give one of them" in capsys.readouterr().err
