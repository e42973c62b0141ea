from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_run

from job import evaluate, sample
from job.data.shards import ShardDataset
from job.data.tokenizer import train
from job.errors import RetryError, UsageError, UserError
from job.lgdlm import data, samples
from job.lgdlm.arrays import read_npz
from job.lgdlm.checkpoint import convert as convert_checkpoint
from job.lgdlm.data import DataOptions, convert
from job.lgdlm.samples import DAMAGED
from job.lgdlm.workers import in_order

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
SAMPLES, VOCAB, LENGTH, DIM = 40, 50, 12, 6
OPTIONS = DataOptions(mask_token_id=1, pad_token_id=0, vocab_size=VOCAB, validation_fraction=0.25)


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    """LGDLM's two directories, every allowed shape and name in them."""
    rng = np.random.default_rng(0)
    tokens, latents = tmp_path / "tokens", tmp_path / "latents"
    tokens.mkdir()
    latents.mkdir()
    for number in range(SAMPLES):
        length = rng.integers(3, LENGTH + 1)
        ids = np.where(np.arange(LENGTH) < length, rng.integers(2, VOCAB, LENGTH), 0).astype(np.int32)
        mask = (np.arange(LENGTH) < length).astype(np.int32 if number % 2 else bool)
        np.savez(
            tokens / (f"{number:06d}_tokens.npz" if number % 3 else f"{number:06d}.npz"),
            input_ids=ids,
            attention_mask=mask,
        )
        latent = np.full((2, DIM), number, np.float32)
        latent[1] = -1  # only row 0 counts
        np.save(latents / f"{number:06d}.npy", [latent[0], latent[:1], latent][number % 3])
    return tokens, latents


def test_samples_keep_their_tokens_and_latents(directories: tuple[Path, Path], tmp_path: Path) -> None:
    summary = convert(*directories, tmp_path / "out", OPTIONS)
    assert "0 bad files" in summary
    seen = []
    for split in ("train", "validation"):
        dataset = ShardDataset(tmp_path / "out", split, verify_hashes=True)
        for index in range(len(dataset)):
            ids, latent = dataset[index]
            number = int(latent[0])
            stem = f"{number:06d}_tokens.npz" if number % 3 else f"{number:06d}.npz"
            source = np.load(directories[0] / stem)
            assert np.array_equal(ids, source["input_ids"][source["attention_mask"] != 0])
            assert np.array_equal(latent, np.full(DIM, number))
            seen.append(number)
    assert sorted(seen) == list(range(SAMPLES))
    assert not list(tmp_path.glob("*partial*"))


def spoil(tokens: Path, latents: Path) -> dict[str, str]:
    """Damage six samples; the file of each and what is said of it."""
    (latents / "000000.npy").unlink()
    (tokens / "000001_tokens.npz").unlink()
    (tokens / "000002_tokens.npz").write_bytes((tokens / "000002_tokens.npz").read_bytes()[:200])
    np.save(latents / "000004.npy", np.array([{"a": "pickle"}], object), allow_pickle=True)
    np.save(latents / "000005.npy", np.full(DIM, np.nan, np.float32))
    np.savez(tokens / "000007_tokens.npz", input_ids=np.full(LENGTH, VOCAB), attention_mask=np.ones(LENGTH, int))
    np.save(latents / "000008.npy", np.ones(DIM + 1, np.float32))
    return {
        "000000.npz": "unpaired",
        "000001.npy": "unpaired",
        "000002_tokens.npz": "corrupt",
        "000004.npy": "corrupt",
        "000005.npy": "not finite",
        "000007_tokens.npz": "token ids 50 to 50 in a vocabulary of 50",
        "000008.npy": "7 dimensions, the first latent has 6",
    }


def test_bad_files_are_named_counted_and_fatal(
    directories: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = spoil(*directories)
    with pytest.raises(UserError, match=r"7 unpaired or corrupt files.*--skip-bad"):
        convert(*directories, tmp_path / "out", OPTIONS)
    lines = capsys.readouterr().err.splitlines()
    for name, problem in expected.items():
        assert any(name in line and problem in line for line in lines), name
    assert any("nothing will be written (--skip-bad" in line for line in lines)
    assert list_of_bad(tmp_path / "out.bad.jsonl") == expected.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents", "out.bad.jsonl", "tokens"]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_swapped_directories_are_named(directories: tuple[Path, Path], tmp_path: Path, skip_bad: bool) -> None:
    tokens, latents = directories
    options = replace(OPTIONS, skip_bad=skip_bad)
    with pytest.raises(UserError, match=r"latents: no tokens here .* give their directory first, then that of the lat"):
        convert(latents, tokens, tmp_path / "out", options)
    with pytest.raises(UserError, match=r"tokens: no latents here"):
        convert(tokens, tokens, tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents", "tokens"]


def test_only_options_of_this_command_are_recommended(directories: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give more texts or another --validation-fraction$"):
        convert(*directories, tmp_path / "out", replace(OPTIONS, validation_fraction=1e-6))


def list_of_bad(path: Path) -> set[str]:
    """The names that a list of bad files has, each with a reason."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(entry["problem"] for entry in entries)
    assert len({entry["file"] for entry in entries}) == len(entries)
    return {Path(entry["file"]).name for entry in entries}


def test_bad_files_can_be_left_out(directories: tuple[Path, Path], tmp_path: Path) -> None:
    expected = spoil(*directories)
    summary = convert(*directories, tmp_path / "out", replace(OPTIONS, skip_bad=True))
    assert f"7 bad files left out (listed in {tmp_path / 'out.bad.jsonl'})" in summary
    assert list_of_bad(tmp_path / "out.bad.jsonl") == expected.keys()
    assert sum(ShardDataset(tmp_path / "out", "train").info.counts.values()) == SAMPLES - 7


def test_a_list_of_bad_files_does_not_outlive_them(directories: tuple[Path, Path], tmp_path: Path) -> None:
    (directories[0] / "000004_tokens.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 unpaired or corrupt files, listed in .*out\.bad\.jsonl"):
        convert(*directories, tmp_path / "out", OPTIONS)
    (directories[0] / "000004_tokens.npz").unlink()
    (directories[1] / "000004.npy").unlink()
    convert(*directories, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out.bad.jsonl").exists()


def test_any_number_of_workers_gives_the_same_bits(
    directories: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parts for each worker, shards that end within a part, and bad files at the start of all."""
    spoil(*directories)
    monkeypatch.setattr(samples, "AT_ONCE", 4)
    monkeypatch.setattr(data, "SHARD_SIZE", 6)
    written, listed = set(), set()
    for workers in (1, 2):
        out = tmp_path / f"with-{workers}"
        convert(*directories, out, replace(OPTIONS, skip_bad=True, workers=workers))
        written.add(tuple((path.name, path.read_bytes()) for path in sorted(out.iterdir())))
        listed.add((tmp_path / f"with-{workers}.bad.jsonl").read_text())
    assert len(written) == len(listed) == 1
    assert len(written.pop()) > 12


def test_a_worker_that_is_killed_is_no_shorter_dataset() -> None:
    with pytest.raises(RetryError, match="a worker process was killed"):
        list(in_order(signal.raise_signal, [signal.SIGKILL] * 10, 2))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_are_read_as_numpy_reads_them(tmp_path: Path, save: Callable[..., None]) -> None:
    """Byte by byte damaged: another array must not come out, nor an error that is not known."""
    path = tmp_path / "a.npz"
    arrays = {"input_ids": np.arange(9, dtype=np.int32), "attention_mask": np.ones(9, bool)}
    save(path, **arrays, other=np.asfortranarray(np.arange(6).reshape(2, 3)))
    whole = path.read_bytes()
    for name, array in zip(arrays, read_npz(str(path), list(arrays)), strict=True):
        assert array.dtype == arrays[name].dtype
        assert np.array_equal(array, arrays[name])
    (other,) = read_npz(str(path), ["other"])
    assert np.array_equal(other, np.arange(6).reshape(2, 3))
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            read = read_npz(str(path), list(arrays))
        except DAMAGED:
            continue
        assert all(np.array_equal(array, arrays[name]) for name, array in zip(arrays, read, strict=True)), at
    path.write_bytes(whole[:-40])
    with pytest.raises(DAMAGED):
        read_npz(str(path), list(arrays))


def test_longer_samples_are_left_out_whole(directories: tuple[Path, Path], tmp_path: Path) -> None:
    longest = LENGTH // 2
    summary = convert(*directories, tmp_path / "out", replace(OPTIONS, max_length=longest))
    info = ShardDataset(tmp_path / "out", "train").info
    masks = [np.load(path)["attention_mask"] for path in directories[0].iterdir()]
    fitting = sum(int(mask.sum()) <= longest for mask in masks)
    assert 0 < fitting == sum(info.counts.values()) < SAMPLES
    assert info.max_length <= longest
    assert f"{SAMPLES - fitting} longer than --max-length {longest}" in summary
    assert info.options["dropped"] == SAMPLES - fitting
    with pytest.raises(UserError, match="every sample is longer than --max-length 2"):
        convert(*directories, tmp_path / "none", replace(OPTIONS, max_length=2))


def test_mask_and_padding_are_two_tokens(directories: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are both 1"):
        convert(*directories, tmp_path / "out", replace(OPTIONS, pad_token_id=1))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="shared/golden is not here")
def test_the_golden_pair_becomes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The research code's data and checkpoint, by the commands of the how-to, with the line that one of them prints."""
    said = convert_checkpoint(GOLDEN / "lgdlm_checkpoint", tmp_path / "weights.safetensors")
    shape = said.partition("use it with: ")[2].split()
    options = DataOptions(
        mask_token_id=3, pad_token_id=0, vocab_size=97, validation_fraction=0.3, max_length=12, skip_bad=True
    )
    pair = (GOLDEN / "lgdlm_data" / "tokens", GOLDEN / "lgdlm_data" / "latents")
    with pytest.raises(UserError, match=r"too few samples are left for the validation split \(1; .*--validation-frac"):
        convert(*pair, tmp_path / "data", options)
    convert(*pair, tmp_path / "data", replace(options, validation_fraction=0.5))
    info = ShardDataset(tmp_path / "data", "train").info
    assert (info.counts, info.max_length, info.latent_dim) == ({"train": 5, "validation": 2}, 11, 16)
    run = tiny_run(tmp_path / "run", tmp_path / "data", *shape, "training.num_train_steps=2")
    capsys.readouterr()
    evaluate.main([str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    sample.main([str(run), "--count", "2"])
    assert len(capsys.readouterr().out.split("text ")) == 3


def test_ids_come_from_the_tokenizer_or_must_be_given(directories: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mask-token-id, --pad-token-id and --vocab-size"):
        convert(*directories, tmp_path / "out", DataOptions())
    (tmp_path / "tokenizer.json").write_text(train(["some words to train on"], 270).to_json())
    options = DataOptions(tokenizer=tmp_path / "tokenizer.json", validation_fraction=0.25)
    convert(*directories, tmp_path / "out", options)
    info = ShardDataset(tmp_path / "out", "train").info
    assert (info.mask_token_id, info.pad_token_id, info.tokenizer) == (1, 0, "tokenizer.json")
    with pytest.raises(UserError, match="exists already"):
        convert(*directories, tmp_path / "out", options)
