from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from job import prepare
from job.data import lock, preparation
from job.data.shards import SPLITS, ShardDataset
from job.data.tokenizer import of_dataset
from job.data.work import Preparation, TextShard

# Those of the fixture `prepared`.
OPTIONS = ["--vocab-size", "300", "--latent-dim", "8", "--validation-fraction", "0.2", "--shard-size", "100"]


def run(out: Path, *options: str) -> int:
    return prepare.main(["--out", str(out), *options])


def start(out: Path, *options: str, rank: int = 0, world_size: int = 1) -> subprocess.Popen[bytes]:
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "job.prepare", "--out", str(out), *options], env=environment)


def content(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def texts(directory: Path, split: str) -> list[str]:
    dataset = ShardDataset(directory, split, verify_hashes=True)  # type: ignore[arg-type]
    tokenizer = of_dataset(directory, dataset.info)
    assert tokenizer
    return [tokenizer.decode(dataset[index][0]) for index in range(len(dataset))]


def test_every_text_comes_back_once_in_one_split(prepared: Path, corpus: Path) -> None:
    train, validation = texts(prepared, "train"), texts(prepared, "validation")
    without_duplicate = corpus.read_text().splitlines()[:-1]  # the last line, in capitals
    assert sorted(train + validation) == sorted(without_duplicate)
    assert 0.14 < len(validation) / 640 < 0.26
    info = ShardDataset(prepared, "train").info
    assert info.shards["train"][0] == 100
    assert info.options["duplicates"] == 1
    assert (info.vocab_size, info.latent_dim) == (300, 8)
    assert sum(info.token_counts) == int(ShardDataset(prepared, "train").lengths(np.arange(len(train))).sum())


def test_latents_belong_to_their_texts(prepared: Path) -> None:
    dataset = ShardDataset(prepared, "validation")
    latents = np.stack([dataset[index][1] for index in range(len(dataset))])
    latents /= np.linalg.norm(latents, axis=1, keepdims=True)
    similarity = latents @ latents.T - 2 * np.eye(len(latents))
    sentences = texts(prepared, "validation")
    shared = [
        len(set(sentences[index].split()) & set(sentences[nearest].split()))
        for index, nearest in enumerate(similarity.argmax(1))
    ]
    anyone = [len(set(left.split()) & set(right.split())) for left, right in itertools.pairwise(sentences)]
    assert np.mean(shared) > np.mean(anyone) + 1.5


def test_a_finished_directory_says_so(prepared: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(prepared)
    assert run(prepared, "--source", str(corpus), *OPTIONS) == 0
    assert "finished already" in capsys.readouterr().out
    assert content(prepared) == before
    assert run(prepared, "--source", str(corpus), *OPTIONS[:-1], "50") == 1
    error = capsys.readouterr().err
    assert "--shard-size 100, not 50" in error
    assert error.count("\n") == 1


def test_killed_at_any_time_it_ends_with_the_same_bits(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    command = ("--source", str(corpus), *OPTIONS)
    for awaited in ("tokenizer.json", "work/plan.json", "train-00001.latents.npy"):
        process = start(out, *command)
        while process.poll() is None and not (out / awaited).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(out, *command).wait() == 0
    assert content(out) == content(prepared)


def test_processes_share_the_work_with_the_same_bits(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    processes = [start(out, "--source", str(corpus), *OPTIONS, rank=rank, world_size=3) for rank in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert content(out) == content(prepared)


def test_a_second_preparation_of_a_directory_is_refused_at_once(
    prepared: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dataset"
    command = ("--source", str(corpus), *OPTIONS)
    with lock.held(out, "another"):
        assert run(out, *command) == 1
        assert "another preparation is at work here" in capsys.readouterr().err
        other_rank = start(out, *command, rank=1, world_size=2)  # of a run whose rank 0 is refused
        with pytest.raises(subprocess.TimeoutExpired):
            other_rank.wait(4)
        assert not any(out.rglob("*.record.json"))
    assert start(out, *command, rank=0, world_size=2).wait() == 0  # now with its rank 0
    assert other_rank.wait() == 0
    assert content(out) == content(prepared)


@pytest.mark.parametrize(
    ("where", "name"),
    [(preparation, "read_json"), (Preparation, "shards"), (TextShard, "record_file")],
    ids=["before the plan is read", "before records are looked for", "between two records"],
)
def test_rank_0_may_finish_while_another_rank_still_looks(
    prepared: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    """Every shard was done in an earlier call, so rank 0 waits for nobody before it removes DIR/work."""
    out = tmp_path / "dataset"
    work = out / "work"
    work.mkdir(parents=True)
    shards = {split: len(rows) for split, rows in ShardDataset(prepared, "train").info.shards.items()}
    plan = {"options": prepared_options(prepared), "encoder": {}, "source_files": [], "shards": shards}
    (work / "plan.json").write_text(json.dumps(plan))
    (out / lock.LOCK_FILE).write_text(json.dumps({"run": "localhost:29500 "}))
    for split, count in shards.items():
        for number in range(count):
            TextShard(work, split, number).record_file.touch()
            TextShard(work, split, number).texts_file.write_text("[]")
    original = vars(where)[name]
    is_property = isinstance(original, property)

    def finish_first(*arguments: Any) -> Any:
        shutil.copytree(prepared, out, dirs_exist_ok=True)
        if is_property:  # half of DIR/work is removed
            for file in work.glob("*.record.json"):
                file.unlink()
        else:
            shutil.rmtree(work, ignore_errors=True)
        return original.fget(*arguments) if is_property else original(*arguments)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(where, name, property(finish_first) if is_property else finish_first)
    assert run(out, "--source", str(corpus), *OPTIONS) == 0
    assert not any(work.glob("*.record.json"))


def prepared_options(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "dataset.json").read_text())["options"])


def test_a_changed_source_is_noticed(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "dataset"
    shutil.copy(corpus, source)
    assert run(out, "--source", str(source), *OPTIONS) == 0
    assert run(out, "--source", f"{tmp_path}/../{tmp_path.name}/a.txt", *OPTIONS) == 0
    assert "finished already" in capsys.readouterr().out
    with source.open("r+") as file:  # of the same size
        file.write("X")
    for spelling in (str(source), f"{tmp_path}/./a.txt"):
        assert run(out, "--source", spelling, *OPTIONS) == 1
        assert f"{source} has changed since {out} was prepared" in capsys.readouterr().err
    source.unlink()  # a finished dataset needs it no more
    assert run(out, "--source", str(source), *OPTIONS) == 0
    assert "note: " in capsys.readouterr().err
    assert run(out, "--source", "elsewhere.txt", *OPTIONS) == 1


def test_a_source_that_changes_before_the_work_is_resumed_is_noticed(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "dataset"
    shutil.copy(corpus, source)
    process = start(out, "--source", str(source), *OPTIONS, rank=0, world_size=2)  # waits for rank 1
    while not (out / "work" / "plan.json").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    with source.open("a") as file:
        file.write("One more line.\n")
    assert run(out, "--source", str(source), *OPTIONS) == 1
    assert f"{source} has changed" in capsys.readouterr().err


def test_unknown_tokens_of_a_given_tokenizer_are_told(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {word: number for number, word in enumerate(["[MASK]", "[PAD]", "?", *corpus.read_text().split()[:4]])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "out"
    assert run(out, "--source", str(corpus), "--tokenizer", str(tmp_path), *OPTIONS[2:]) == 0
    splits = [ShardDataset(out, split) for split in SPLITS]
    unknown = sum(int((rows[index][0] == 2).sum()) for rows in splits for index in range(len(rows)))
    assert unknown == prepared_options(out)["unknown_tokens"] > 1000
    assert f"unknown      {unknown} tokens" in capsys.readouterr().out


def test_an_unfinished_directory_with_other_options_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "plan.json").write_text(json.dumps({"options": {"source": ["elsewhere"]}}))
    assert run(tmp_path, "--source", str(corpus), *OPTIONS) == 1
    assert "--source ['elsewhere']" in capsys.readouterr().err


def test_long_texts_are_dropped_and_counted(
    prepared: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = ShardDataset(prepared, "train")
    median = int(np.median(everything.lengths(np.arange(len(everything)))))
    assert run(tmp_path / "a", "--source", str(corpus), *OPTIONS, "--max-length", str(median)) == 0
    info = ShardDataset(tmp_path / "a", "train").info
    assert info.max_length == median
    assert 0 < info.options["dropped"] == 640 - sum(info.counts.values())
    assert f"{info.options['dropped']} longer than --max-length {median}" in capsys.readouterr().out
    assert run(tmp_path / "b", "--source", str(corpus), *OPTIONS, "--max-length", "1") == 1
    assert "longer than --max-length 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "directory", "glob"])
def test_other_sources_give_the_same_dataset(prepared: Path, corpus: Path, tmp_path: Path, kind: str) -> None:
    lines = corpus.read_text().splitlines()
    folder = tmp_path / "texts"
    folder.mkdir()
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines))
    elif kind == "parquet":
        pq.write_table(pa.table({"body": lines, "other": range(len(lines))}), folder / "a.parquet")
    else:
        (folder / "a.txt").write_text("\n\n".join(lines[:300]))
        (folder / ("b.txt" if kind == "directory" else "b.md")).write_text("\n".join(lines[300:]))
    source = {"directory": str(folder), "glob": str(folder / "*")}.get(kind, str(folder / f"a.{kind}"))
    assert run(tmp_path / "out", "--source", source, "--text-key", "body", *OPTIONS) == 0
    there, here = content(prepared), content(tmp_path / "out")
    assert there.pop("dataset.json") != here.pop("dataset.json")  # they name their sources
    assert there == here


def test_sentences_of_long_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "\n".join(
            f"The number {n} is here. It comes before {n + 1} in the list. Nothing else matters at {n}."
            for n in range(60)
        )
    )
    assert run(tmp_path / "out", "--source", str(tmp_path / "a.txt"), "--split-sentences", *OPTIONS) == 0
    assert "It comes before 8 in the list." in texts(tmp_path / "out", "train") + texts(tmp_path / "out", "validation")


def test_a_given_tokenizer_keeps_its_own_special_tokens(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    given = json.loads((prepared / "tokenizer.json").read_text().replace("[MASK]", "@mask").replace("[PAD]", "@pad"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(given))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": "@mask", "pad_token": "@pad"}))
    out = tmp_path / "out"
    assert run(out, "--source", str(corpus), "--tokenizer", str(tmp_path), *OPTIONS[2:]) == 0
    assert (ShardDataset(out, "train").info.mask_token_id, ShardDataset(out, "train").info.pad_token_id) == (1, 0)
    assert texts(out, "train") == texts(prepared, "train")


BAD_FILES = {
    "key.jsonl": (b'{"body": "x"}\n', "key.jsonl:1: no text under the key 'text', it has body"),
    "json.jsonl": (b'{"text": "x"}\n{"te', "json.jsonl:2: not JSON"),
    "utf.txt": ("in UTF-16\n".encode("utf-16"), "utf.txt: not UTF-8 text, it begins as UTF-16 does; convert it: iconv"),
    "latin.txt": (
        b"one\ncaf\xe9 noir\n",
        r"latin.txt: not UTF-8 text (invalid continuation byte 0xe9 after 'one\ncaf')",
    ),
    "damaged.parquet": (b"PAR1 no", "cannot be read as parquet"),
    "empty.txt": (b"\n", "no text for the train split"),
    "same.txt": (b"Hello, world.\n" * 500, "all 500 texts are the same"),
    "few.txt": (b"\n".join(b"word %d" % n for n in range(50)), "--latent-dim 64"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_in_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    assert run(tmp_path / "out", "--source", str(tmp_path / name), "--validation-fraction", "0.2") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


BAD_COMMANDS = {
    "--encoder-model x": "--encoder-model has no effect with --encoder lsa",
    "--encoder sentence_transformers": "needs --encoder-model",
    "--encoder sentence_transformers --encoder-model ./none": "./none: no such directory",
    "--encoder sentence_transformers --encoder-model x --latent-dim 3": "--latent-dim has no effect",
    "--tokenizer x --vocab-size 300": "--vocab-size has no effect with --tokenizer x",
    "--mask-token x": "no effect with --tokenizer train",
    "--validation-fraction 1": "between 0 and 1",
    "--vocab-size 10": "give at least 260",
    "--max-length 0": "give at least 1",
    "--source nowhere.txt --seed 4294967296": "--seed 4294967296: give at most 4294967295",
    "--out s3://bucket/data": "--out s3://bucket/data: datasets are written to a directory",
    "--out=": "--out is empty: give a directory",
    "--ray-actors 2": "--ray-actors has no effect without --ray",
    "--ray-gpus-per-actor 0.5": "--ray-gpus-per-actor has no effect without --ray",
    "--ray --ray-gpus-per-actor -1": "give at least 0",
}


@pytest.mark.parametrize("options", BAD_COMMANDS)
def test_a_bad_command_line_exits_2(tmp_path: Path, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", *options.split()) == 2
    assert BAD_COMMANDS[options] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--source nowhere.txt", "no such file"),
        ("--source=", "--source is empty"),
        ("--source {} --tokenizer nowhere --local-files-only", "tokenizer nowhere: no such file"),
    ],
)
def test_missing_things_are_named(
    tmp_path: Path, corpus: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *options.format(corpus).split(), "--latent-dim", "8") == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
