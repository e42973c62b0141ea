"""What a program, the commands and an export make of a trained model: the same, also without the run and its data."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import tiny_run

from job import convert, decode, encode, evaluate, load, sample
from job.api import DecodingWarning, Model
from job.data.shards import ShardDataset
from job.errors import UserError
from job.text_files import refuse_same
from job.trained import WEIGHTS_KEY, load_trained

ROOT = Path(__file__).parent.parent
TEXTS = ["The parser returns the first line.", "A thread opens an empty list.", "Every test checks each value."]


@pytest.fixture(scope="module")
def data(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data at a place of its own, from which tests may take it away."""
    copy = tmp_path_factory.mktemp("data") / "sentences"
    shutil.copytree(prepared, copy)
    return copy


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "demo", data, "training.ema_decay=0.5")


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return load(run, device="cpu")


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, job; assert 'torch' not in sys.modules; job.load; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_to_use_a_model_pytorchs_compiler_is_not_loaded(run: Path) -> None:
    code = (
        "import sys; from job import load; load(sys.argv[1], device='cpu').round_trip(['A text.']);"
        "print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code, run], cwd=ROOT, text=True) == "False\n"


def test_latents_are_in_the_units_of_the_data(model: Model, data: Path) -> None:
    """As training standardizes them: what `encode` gives, standardized, is what an evaluation compares."""
    held_out = ShardDataset(data, "validation")
    texts = [model.tokenizer.decode(held_out[index][0]) for index in range(48)]
    latents = model.encode(texts)
    assert latents.dtype == np.float32
    assert latents.shape == (48, 8)
    raw = np.stack([held_out[index][1] for index in range(48)])
    mean, std = (np.array(values) for values in (model.description.latent_mean, model.description.latent_std))
    # The untrained head predicts around zero in standardized units, which is the mean in the data's own.
    assert np.abs(latents.mean(0) - mean).max() < std.max()
    assert np.abs(latents - raw).mean() < np.abs((latents - mean) / std - raw).mean()


def test_the_encoder_of_the_data_travels_with_the_model(model: Model, run: Path, data: Path) -> None:
    assert (run / "model" / "encoder.safetensors").is_file()
    held_out = ShardDataset(data, "validation")
    texts = [model.tokenizer.decode(held_out[index][0]) for index in range(5)]
    true = np.stack([held_out[index][1] for index in range(5)])
    np.testing.assert_allclose(model.encoder().encode(texts), true, atol=1e-6)


def test_a_result_depends_on_its_own_input_alone(model: Model) -> None:
    together, alone = model.encode(TEXTS, batch_size=2), [model.encode([text])[0] for text in TEXTS]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-6)
    assert not np.allclose(together, model.encode(TEXTS, seed=1))
    sampled = model.decode_ids(together, 7, temperature=2.0, batch_size=2)
    first = model.decode_ids(together[:1], 7, temperature=2.0)
    assert first[0].tolist() == sampled[0].tolist()
    assert sampled[0].tolist() != model.decode_ids(together[:1], 7, temperature=2.0, seed=1)[0].tolist()


def test_lengths_are_given_or_likely(model: Model, data: Path) -> None:
    held_out = ShardDataset(data, "validation")
    rows = np.arange(len(held_out))
    latents, true = np.stack([held_out[int(row)][1] for row in rows]), held_out.lengths(rows)
    assert [len(row) for row in model.decode_ids(latents[:3], [3, 1, 9])] == [3, 1, 9]
    assert [len(row) for row in model.decode_ids(latents[:3], 5)] == [5, 5, 5]
    likely = model.likely_lengths(latents)
    assert [len(row) for row in model.decode_ids(latents[:3])] == likely[:3].tolist()
    assert np.abs(likely - true).mean() < np.abs(round(true.mean()) - true).mean()  # better than one for all


def test_a_round_trip_is_both_ways_with_the_own_lengths(model: Model) -> None:
    counts = model.token_counts(TEXTS)
    assert model.round_trip(TEXTS) == model.decode(model.encode(TEXTS), counts)
    assert model.encode([]).shape == (0, 8)
    assert model.decode([]) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.encode("one text"), "list of texts"),
        (lambda model: model.encode(["fine"], batch_size=0), "batch_size=0: give at least 1"),
        (lambda model: model.encode(["fine"], batch_size=None), "batch_size=None: give a whole number"),
        (lambda model: model.encode(["fine"], batch_size=True), "batch_size=True: give a whole number"),
        (lambda model: model.encode(["fine"], steps=1.5), "steps=1.5: give a whole number"),
        (lambda model: model.encode(["fine"], steps=0), "steps=0: give at least 1"),
        (lambda model: model.encode(["fine"], seed="1"), "seed='1': give a whole number"),
        (lambda model: model.encode(None), "give a list of texts, not None"),
        (lambda model: model.encode(["fine", "a\ud800b"]), r"text 2: half of a surrogate pair \(\\ud800\)"),
        (lambda model: model.decode(np.zeros((1, 8)), seed=1.5), "seed=1.5: give a whole number"),
        (lambda model: model.decode(np.zeros((1, 8)), steps=1.5), "steps=1.5: give a whole number"),
        (lambda model: model.decode(np.zeros((1, 8)), steps=None), "steps=None: give a whole number"),
        (lambda model: model.decode(np.zeros((1, 8)), candidates=True), "candidates=True: give a whole number"),
        (lambda model: model.decode(np.zeros((1, 8)), temperature="x"), "temperature='x': give a number"),
        (lambda model: model.decode(np.zeros((1, 8)), temperature=np.float32("nan")), "temperature=nan: give a finite"),
        (lambda model: model.decode(np.zeros((1, 8)), top_p=True), "top_p=True: give a number"),
        (lambda model: model.decode(np.full((2, 8), [[0], [1e20]])), "latent 2 cannot be decoded: the probabilities"),
        (lambda model: model.encode(["fine", "", ""]), r"text 2, '': 0 tokens; this model takes 1 to 32 \(1 more"),
        (lambda model: model.encode(["fine", float("nan")]), "text 2 is nan, not a string"),
        (lambda model: model.encode(["word " * 50]), "this model takes 1 to 32"),
        (lambda model: model.decode(np.zeros((2, 7))), r"\[2, 7\]; this model takes \[N, 8\]"),
        (lambda model: model.decode(np.zeros((2, 0))), r"\[2, 0\]; this model takes \[N, 8\]"),
        (lambda model: model.encode_ids([[]]), r"row 1: of shape \[0\]; give 1 to 32 token ids"),
        (lambda model: model.encode_ids([[5], [10**6]]), "row 2: token ids lie between 0 and"),
        (lambda model: model.encode_ids([[-1]]), "row 1: token ids lie between 0 and"),
        (lambda model: model.encode_ids([[0.5]]), "row 1: token ids are whole numbers"),
        (lambda model: model.decode_ids(np.zeros((1, 8)), template=[[-1]]), "row 1: token ids lie between"),
        (lambda model: model.decode(np.zeros(8)), r"\[8\]; this model takes \[N, 8\]"),
        (lambda model: model.decode(np.full((1, 8), np.nan)), "latent 1 holds a number that is not finite"),
        (lambda model: model.decode([["a"] * 8]), "not rows of numbers"),
        (lambda model: model.decode(np.zeros((2, 8)), [3]), "1 lengths for 2 latents"),
        (lambda model: model.decode(np.zeros((2, 8)), 33), "length 33 of text 1: this model takes 1 to 32"),
        (lambda model: model.decode(np.zeros((2, 8)), 2.5), "counts of tokens"),
    ],
)
def test_what_cannot_be_used_is_named(call: object, words: str, model: Model) -> None:
    with pytest.raises(UserError, match=words):
        call(model)  # type: ignore[operator]


def test_how_it_is_computed_can_be_chosen(run: Path, model: Model) -> None:
    half = load(str(run), device="cpu", dtype="bf16", average=False)
    assert half.trained.averaged is False
    assert model.trained.averaged is True
    assert half.device == torch.device("cpu")
    exact = load(run, device=torch.device("cpu"), dtype="fp32", average=False).encode(TEXTS)
    difference = np.abs(half.encode(TEXTS) - exact).max()
    assert 0 < difference < 0.1
    for options, words in (
        ({"dtype": "float16"}, "dtype 'float16': choose one of auto, bf16, fp32"),
        ({"device": "gpu"}, "device 'gpu': "),
        ({"device": None}, "device 'None': "),
    ):
        with pytest.raises(UserError, match=words):
            load(run, **options)


def test_numbers_of_numpy_are_numbers(model: Model) -> None:
    three: Any = np.int64(3)
    latents = model.encode(TEXTS, seed=three, batch_size=three)
    np.testing.assert_allclose(latents, model.encode(TEXTS, seed=3), atol=1e-6)
    half: Any = np.float32(0.5)
    drawn = model.decode_ids(latents, 9, temperature=half, seed=three, candidates=three)
    same = model.decode_ids(latents, 9, temperature=0.5, seed=3, candidates=3)
    assert [row.tolist() for row in drawn] == [row.tolist() for row in same]


@pytest.mark.parametrize("copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_copy_gives_the_same_bits(copied: Callable[[Any], Any], run: Path, data: Path, model: Model) -> None:
    original = load(run, device="cpu", data=data)
    latents, rows = original.encode(TEXTS), original.decode_ids(model.encode(TEXTS), 9, temperature=2.0)
    whole, with_inner = copied(original), load(run, device="cpu")
    with_inner.objective.model = copied(original.objective.model)
    for weight in original.objective.parameters():
        weight.data.zero_()  # copies have weights of their own
    for same in (whole, with_inner):
        np.testing.assert_array_equal(same.encode(TEXTS), latents)
        again = same.decode_ids(latents, 9, temperature=2.0)
        assert [row.tolist() for row in again] == [row.tolist() for row in rows]
    assert whole.decode(latents) == model.decode(latents)
    np.testing.assert_array_equal(whole.encoder().encode(TEXTS), model.encoder().encode(TEXTS))


@pytest.mark.filterwarnings("ignore::job.api.DecodingWarning")
@pytest.mark.parametrize("implementation", ["fast", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_programs_default_type_changes_nothing(dtype: torch.dtype, implementation: str, run: Path) -> None:
    def results() -> list[Any]:
        trained = load_trained(run)
        trained.config.model.implementation = implementation
        loaded = Model(trained, torch.device("cpu"), "fp32")
        latents = loaded.encode(TEXTS, steps=2)
        rows = loaded.decode_ids(latents, 9, temperature=0.8, top_p=0.9, steps=3, remasking=0.3, candidates=2)
        corrected = loaded.decode_ids(latents, 9, corrections=1)
        figures = evaluate.Held(trained, loaded.device, 8, 8).measured(loaded.config.decoding)
        return [latents.tolist(), [row.tolist() for row in rows], [row.tolist() for row in corrected], figures]

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        assert results() == expected
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_texts_have_no_latents(model: Model) -> None:
    latents = model.encoder().encode([])
    assert latents.shape == (0, 8)
    assert latents.dtype == np.float32


def test_a_text_is_cut_on_request(model: Model) -> None:
    assert model.encode(["word " * 50], truncate=True).shape == (1, 8)


# From file to file.


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path


def test_encode_decode_encode_through_files(elsewhere: Path, run: Path, model: Model) -> None:
    encode.main([str(run), "texts.txt", "latents.npy", "--lengths", "lengths.txt"])
    np.testing.assert_allclose(np.load("latents.npy"), model.encode(TEXTS), atol=1e-6)
    decode.main([str(run), "latents.npy", "back.txt", "--lengths", "lengths.txt"])
    assert Path("back.txt").read_text().splitlines() == model.round_trip(TEXTS)
    encode.main([str(run), "texts.txt", "latents.jsonl"])
    decode.main([str(run), "latents.jsonl", "back.jsonl"])  # which says the lengths itself
    assert [json.loads(line)["text"] for line in Path("back.jsonl").read_text().splitlines()] == model.round_trip(TEXTS)
    encode.main([str(run), "back.jsonl", "again.jsonl"])
    again = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["latent"] for line in again], model.encode(model.round_trip(TEXTS)), atol=1e-6)


@pytest.mark.parametrize(
    ("latents", "redirection", "code", "said"),
    [
        ("-", ">/dev/full", 1, "error: standard output: No space left on device\n"),
        ("-", ">&-", 1, "error: standard output: it is closed\n"),
        ("latents.npy", ">&- 2>/dev/full", 0, ""),
    ],
)
def test_a_result_that_cannot_be_written_is_an_error(
    latents: str, redirection: str, code: int, said: str, run: Path, elsewhere: Path
) -> None:
    """And nothing else is: what is said beside a result may be lost."""
    command = f'"{sys.executable}" -m job.encode "{run}" texts.txt {latents} --device cpu {redirection}'
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.decode()) == (code, said)
    assert Path("latents.npy").exists() == (latents != "-")


def test_standard_input_and_output(run: Path, elsewhere: Path, model: Model) -> None:
    def command(name: str, given: bytes) -> bytes:
        arguments = [sys.executable, "-m", "job", name, str(run), "-", "-", "--device", "cpu"]
        done = subprocess.run(arguments, input=given, capture_output=True, env={"PYTHONPATH": str(ROOT)}, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    back = command("decode", command("encode", Path("texts.txt").read_bytes()))
    assert back.decode().splitlines() == model.round_trip(TEXTS)


@pytest.mark.parametrize(
    ("command", "arguments", "content", "words"),
    [
        (encode, ["in.txt", "out.txt"], b"text\n", "out.txt: give a name that ends with .npy or .jsonl"),
        (encode, ["in.txt", "out.npy"], b"", "in.txt: no texts"),
        (encode, ["in.txt", "out.npy"], b"\xff\n", "in.txt: not UTF-8"),
        (encode, ["in.txt", "out.npy"], "text\n".encode("utf-16"), "in.txt: not UTF-8 text, it begins as UTF-16 does"),
        (
            decode,
            ["in.jsonl", "out.txt", "--lengths=-1"],
            b'{"latent": [1]}\n',
            "--lengths -1: give at least 1, or a file",
        ),
        (encode, ["absent.txt", "out.npy"], b"", "absent.txt: No such file"),
        (encode, ["in.jsonl", "out.npy"], b'{"a": 1}\n', 'in.jsonl: line 1 is no JSON object with "text"'),
        (encode, ["in.jsonl", "out.npy"], b'{"text": 5}\n', 'in.jsonl: "text" of line 1 is no text'),
        (decode, ["in.npy", "out.txt"], b"text\n", "in.npy: damaged, or not a file of numpy"),
        (decode, ["in.jsonl", "out.txt"], b'{"latent": "x"}\n', "in.jsonl: latents are not lists of numbers"),
        (decode, ["in.jsonl", "out.txt"], b'{"latent": [1, 2]}\n', "this model takes \\[N, 8\\]"),
        (decode, ["in.jsonl", "out.csv"], b"", "out.csv: give a name that ends with .txt or .jsonl"),
        (decode, ["in.jsonl", "in.txt/out.txt"], b"", "in.txt/out.txt: no file can be written there"),
        (encode, ["in.txt", "out.npy", "--lengths", "in.txt"], b"text\n", "in.txt: it would be written over"),
        (encode, ["in.txt", "out.jsonl", "--lengths", "./out.jsonl"], b"text\n", "out.jsonl: it would be written over"),
        (decode, ["in.jsonl", "in.jsonl"], b"", "in.jsonl: it would be written over"),
        (encode, ["in.csv", "out.npy"], b"", "in.csv: texts are read as lines, or from .jsonl"),
        (encode, ["in.txt", "out.npy", "--lengths", "."], b"text\n", r"\.: no file can be written there"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    command: object, arguments: list[str], content: bytes, words: str, elsewhere: Path, run: Path
) -> None:
    for name in ("in.txt", "in.jsonl", "in.npy"):
        (elsewhere / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        command.main([str(run), *arguments])  # type: ignore[attr-defined]
    assert not list(elsewhere.glob("out.*"))


def test_two_results_do_not_share_standard_output() -> None:
    refuse_same(["-"], ["-", "/dev/null", "/dev/null"])
    with pytest.raises(UserError, match="-: it would be written over"):
        refuse_same([], ["-", "-"])


# Without the run, and without the data.


def test_a_run_needs_its_data_for_held_out_texts_alone(
    run: Path, data: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(run), "--json"])
    with_data = json.loads(capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    assert with_data == pytest.approx({key: result[key] for key in with_data})
    sample.main([str(run), "--text", TEXTS[0]])
    printed = capsys.readouterr().out
    data.rename(data.with_name("away"))
    try:
        sample.main([str(run), "--text", TEXTS[0]])
        assert capsys.readouterr().out == printed
        with pytest.raises(UserError, match="the run's data directory is not here; name it with --data"):
            sample.main([str(run)])
        evaluate.main([str(run), "--json", "--data", str(data.with_name("away"))])
        assert json.loads(capsys.readouterr().out) == with_data
    finally:
        data.with_name("away").rename(data)


def test_an_export_needs_neither_run_nor_data(run: Path, data: Path, elsewhere: Path, model: Model) -> None:
    convert.main(["export", str(run), "exported"])
    assert 'latents = model.encode(["A text."])' in Path("exported/README.md").read_text()
    np.save("expected.npy", model.encode(TEXTS))
    code = (
        "import json, sys, numpy as np; from job import load; m = load('exported', device='cpu'); "
        "texts = open('texts.txt').read().splitlines(); "
        "print(json.dumps([float(np.abs(m.encode(texts) - np.load('expected.npy')).max()), m.round_trip(texts), "
        "m.decode(np.load('expected.npy'))]))"
    )
    hidden = [path.rename(path.with_name("away")) for path in (run, data)]
    try:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=120)
    finally:
        hidden[0].rename(run)
        hidden[1].rename(data)
    assert done.returncode == 0, done.stderr.decode()
    difference, trips, decoded = json.loads(done.stdout)
    assert difference < 1e-6
    assert trips == model.round_trip(TEXTS)
    assert decoded == model.decode(np.load("expected.npy"))


def test_a_checkpoint_that_was_copied_alone_knows_its_statistics(
    run: Path, data: Path, tmp_path: Path, model: Model
) -> None:
    checkpoint = next((run / "checkpoints").glob("step_*"))
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    data.rename(data.with_name("away"))
    try:
        alone = load(tmp_path / checkpoint.name, device="cpu")
        assert alone.description == model.description
        latents = model.encode(TEXTS)
        assert [row.tolist() for row in alone.decode_ids(latents)] == [r.tolist() for r in model.decode_ids(latents)]
        with pytest.raises(UserError, match=r"tokenizer\.json is not beside it, .*; name the run's data with --data"):
            alone.encode(TEXTS)
    finally:
        data.with_name("away").rename(data)


def test_a_program_may_change_its_directory(run: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    loaded = load(run.name, device="cpu")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert loaded.encoder().encode(TEXTS).shape == (3, 8)


def test_a_damaged_export_is_refused(run: Path, elsewhere: Path) -> None:
    convert.main(["export", str(run), "exported"])
    weights = bytearray(Path("exported/model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 0x40
    for content in (weights, weights[:-100]):
        Path("exported/model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors is missing or damaged: SHA-256 differs"):
            load("exported", device="cpu")
    for damaged in (b"", b"[]", b"\xff", b'{"config": {"unknown": 1}}', b"{}"):
        Path("exported/config.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"exported/config\.json: damaged, or of another version"):
            load("exported", device="cpu")
    Path("exported/config.json").unlink()
    with pytest.raises(UserError, match=r"exported/config\.json: missing, .*; copy the exported directory as a whole"):
        load("exported", device="cpu")


@pytest.mark.filterwarnings("ignore::job.api.DecodingWarning")
def test_what_is_not_finite_is_no_result(run: Path) -> None:
    broken = load(run, device="cpu")
    next(iter(broken.objective.model.parameters())).data.fill_(float("nan"))
    with pytest.raises(UserError, match="the latent of text 1 is not finite"):
        broken.encode(TEXTS)
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "candidates": 2}, {"corrections": 1}):
        with pytest.raises(UserError, match="latent 1 cannot be decoded: the probabilities of its tokens are not fin"):
            broken.decode(np.zeros((2, 8)), 5, **options)


def test_weights_that_are_not_finite_are_told(run: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.main(["export", str(run), "exported"])
    weights = load_file("exported/model.safetensors")
    weights["text_head.weight"][3, 5] = float("inf")
    save_file(weights, "exported/model.safetensors")
    values = json.loads(Path("exported/config.json").read_text())
    del values[WEIGHTS_KEY]  # one from before exports had a digest
    Path("exported/config.json").write_text(json.dumps(values))
    capsys.readouterr()
    load("exported", device="cpu")
    assert f"warning: exported: 1 of {len(weights)} tensors of weights hold NaN or infinity" in capsys.readouterr().err
    load(run, device="cpu")
    assert not capsys.readouterr().err


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(UserError, match=r"run: no checkpoint in this run yet; it saves every logging\.save_freq"):
            sample.main([str(path)])


def test_a_template_keeps_its_words(model: Model) -> None:
    latents = model.encode(TEXTS)
    rows = [row.copy() for row in model.tokenizer.encode(TEXTS)]
    holes = [row.copy() for row in rows]
    for row in holes:
        row[1::2] = model.tokenizer.mask_token_id
    made = model.decode_ids(latents, template=holes)
    for row, hole, filled in zip(rows, holes, made, strict=True):
        assert filled[::2].tolist() == row[::2].tolist()
        assert not np.isin(filled, [model.tokenizer.mask_token_id, model.tokenizer.pad_token_id]).any()
        assert len(filled) == len(hole)
    with pytest.raises(UserError, match="leave lengths out"):
        model.decode_ids(latents, 9, template=holes)


def test_decoding_is_as_configured_but_for_what_is_given(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    latents = model.encode(TEXTS)
    with pytest.warns(DecodingWarning, match="decoding.steps=3"):
        passes = model.decode_ids(latents, 9, steps=3)
    configured = Model(model.trained, model.device, "fp32")
    before = model.config.decoding
    model.config.decoding = dataclasses.replace(before, steps=3)
    try:
        with pytest.warns(DecodingWarning):
            same = configured.decode_ids(latents, 9)
    finally:
        model.config.decoding = before
    assert [row.tolist() for row in passes] == [row.tolist() for row in same]
    with pytest.raises(UserError, match=r"decoding\.candidates=3: without a temperature"):
        model.decode(latents, 9, candidates=3)
    with pytest.raises(UserError, match=r"decoding\.top_p=2"):
        model.decode(latents, 9, top_p=2.0)
    with pytest.raises(UserError, match="passes: no such option; choose among steps"):
        model.decode(latents, 9, passes=2)  # type: ignore[call-arg]


def test_scores_by_number_of_passes(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([str(run), "--data", str(data), "--num-samples", "8", "--passes", "1", "2", "--device", "cpu"])
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["passes", "1", "2", "true"]
    assert "decoding.steps=2: this model decodes partly masked texts" in printed.err
    one_pass = printed.out.splitlines()[1].split()
    evaluate.main([str(run), "--data", str(data), "--num-samples", "8", "--json", "--device", "cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert one_pass[1] == f"{figures['t2l2t/token_acc']:.1%}"  # one pass is what the evaluation always measures
