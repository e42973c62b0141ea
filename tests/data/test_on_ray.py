"""Latents made on a real Ray cluster of two nodes, on this machine (make test-ray)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from job import prepare
from job.data.on_ray import gpus_of_actor, interrupts_kept, silence_told
from job.data.options import LocalOptions
from job.errors import ExitCode

ROOT = Path(__file__).parents[2]
OPTIONS = ["--vocab-size", "300", "--validation-fraction", "0.2", "--shard-size", "100"]
LSA = ["--latent-dim", "8"]
TEXTS = 12_800  # of `many`
THREE_CHUNKS = ["--shard-size", "9000"]  # the first shard of training; the two others have one
NOBODY = "http://127.0.0.1:9"
STORE_BYTES = 80_000_000  # of each node, the least that Ray takes
# Stands in for sentence-transformers, since it must know what it has encoded, be slow, and die in the middle. The
# model is a directory: it holds what was encoded, and what is to happen.
STAND_IN = """
import os, pathlib, signal, time, torch

class SentenceTransformer(torch.nn.Linear):
    def __init__(self, name, **options):
        super().__init__(1, 3, bias=False)
        torch.nn.init.ones_(self.weight)
        self.directory = pathlib.Path(name)
        if (self.directory / "broken").exists() and "ray::" in pathlib.Path("/proc/self/cmdline").read_text():
            raise OSError("no weights here")

    def encode(self, texts, **options):
        latents = torch.tensor([[float(len(text)), float(ord(text[4])), 1.0] for text in texts])
        if texts == ["width"]:
            return latents
        if (self.directory / "kill").exists():
            (self.directory / "kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2 + len(texts) / 4000)
        with (self.directory / "encoded").open("a") as file:
            file.write("".join(f"{text}\\n" for text in texts))
        return latents
"""


@dataclass
class Lab:
    """A cluster, and the variables of a command that uses it."""

    address: str
    environment: dict[str, str]

    def command(self, out: Path, source: Path, *options: str, ray: str | None = None) -> list[str]:
        command = [sys.executable, "-m", "job.prepare", "--out", str(out), "--source", str(source)]
        return [*command, *OPTIONS, *options, "--ray", ray or self.address]

    def run(self, *arguments: Any, **where: Any) -> subprocess.CompletedProcess[str]:
        return run(self, self.command(*arguments, **where))

    def start(self, *arguments: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(*arguments), env=self.environment, stderr=subprocess.PIPE, text=True)


def run(lab: Lab, command: list[str], directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=lab.environment, cwd=directory, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not importlib.util.find_spec("ray"):
        pytest.skip("needs Ray: make test-ray")
    library = tmp_path_factory.mktemp("library")
    (library / "sentence_transformers.py").write_text(STAND_IN)
    path = os.pathsep.join([str(library), str(ROOT)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HOME", str(library))  # Ray keeps tokens there
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # A new cluster tells its makers even that it tells nothing, and asks whether it is in a cloud: nobody, here.
        patch.setenv("RAY_USAGE_STATS_REPORT_URL", NOBODY)
        patch.setenv("http_proxy", NOBODY)
        utils = importlib.import_module("ray.cluster_utils")  # it reads some of these variables
        nodes = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        cluster = utils.Cluster(initialize_head=True, head_node_args=nodes)
        try:
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            yield Lab(cluster.address, dict(os.environ))
        finally:
            cluster.shutdown()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory for the stand-in."""
    directory = tmp_path / "model"
    directory.mkdir()
    return directory


def slow(model: Path) -> list[str]:
    return ["--encoder", "sentence_transformers", "--encoder-model", str(model)]


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def encoded(model: Path) -> list[str]:
    return (model / "encoded").read_text().splitlines()


def without_ray(lab: Lab, out: Path, source: Path, *options: str) -> dict[str, bytes]:
    """The files that one process writes."""
    done = run(lab, lab.command(out, source, *options)[:-2])
    assert done.returncode == 0, done.stderr
    return content(out)


def problem(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed command says at its end; the lines before are no traceback."""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def many(corpus: Path, directory: Path) -> Path:
    """TEXTS different texts and some twice."""
    path, sentences = directory / "many.txt", corpus.read_text().splitlines()
    path.write_text("".join(f"{sentence} {number}\n" for number in range(20) for sentence in sentences))
    return path


def test_the_bits_are_those_of_one_process(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    source, out = many(corpus, tmp_path), tmp_path / "out"
    options = [*LSA, *THREE_CHUNKS]
    done = run(lab, lab.command(Path(out.name), source, *options, "--ray-actors", "2"), directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Ray: 2 nodes, 2 CPUs, 0 GPUs\n" in done.stderr
    assert len(list(out.glob("*.latents.npy"))) == 3
    assert content(out) == without_ray(lab, tmp_path / "plain", source, *options)
    again = lab.run(out, source, *options, ray="127.0.0.1:1")  # a finished directory needs no cluster
    assert "finished already" in again.stdout


def test_a_lost_worker_loses_nothing(lab: Lab, corpus: Path, tmp_path: Path, model: Path) -> None:
    (model / "kill").touch()
    done = lab.run(tmp_path / "out", corpus, *slow(model))
    assert done.returncode == 0, done.stderr
    assert not (model / "kill").exists()
    assert len(encoded(model)) == len(set(encoded(model))) == 640
    assert content(tmp_path / "out") == without_ray(lab, tmp_path / "plain", corpus, *slow(model))


@pytest.mark.parametrize("goes_on", ["on Ray", "without"])
def test_what_came_before_a_kill_is_encoded_once(
    lab: Lab, corpus: Path, tmp_path: Path, model: Path, goes_on: str
) -> None:
    out, source = tmp_path / "out", many(corpus, tmp_path)
    process = lab.start(out, source, *slow(model), *THREE_CHUNKS)
    while not list(out.glob("work/train-00000.chunk-*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = sum(len(np.load(path)) for path in out.glob("work/*.chunk-*.npy"))
    assert 0 < kept < TEXTS
    kept += sum(json.loads(path.read_bytes())["rows"] for path in out.glob("work/*.record.json"))
    before = encoded_at_rest(model)
    command = lab.command(out, source, *slow(model), *THREE_CHUNKS)
    done = run(lab, command if goes_on == "on Ray" else command[:-2])
    assert done.returncode == 0, done.stderr
    assert "going on with the work" in done.stderr
    assert len(encoded(model)) - before == TEXTS - kept
    assert content(out) == without_ray(lab, tmp_path / "plain", source, *slow(model), *THREE_CHUNKS)


def test_an_interrupt_ends_the_actors(lab: Lab, corpus: Path, tmp_path: Path, model: Path) -> None:
    process = lab.start(tmp_path / "out", many(corpus, tmp_path), *slow(model))
    while not (model / "encoded").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in told
    assert encoded_at_rest(model) < TEXTS


def test_an_interrupt_that_is_swallowed_comes_again() -> None:
    def waits_in_a_destructor() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep(30)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        waits_in_a_destructor()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_ray_waits_for_is_told(lab: Lab, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = lab.start(tmp_path / "out", corpus, *LSA, "--ray-gpus-per-actor", "0.5")
    assert process.stderr
    told = next(line for line in process.stderr if "GPUs, as every actor needs" in line)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert told.startswith("Ray: no node has 0.5 GPUs, as every actor needs; waiting")
    with silence_told(0.1):
        time.sleep(0.3)
    with silence_told(0.3) as came:
        for _ in range(10):
            came.set()
            time.sleep(0.05)
    assert "nothing came back for 0.1 seconds" in (said := capsys.readouterr().err)
    assert "for 0.3 seconds" not in said


def encoded_at_rest(model: Path) -> int:
    """How many texts were encoded, once the actors of a command that has ended are gone."""
    while True:
        count = len(encoded(model))
        time.sleep(1.5)
        if len(encoded(model)) == count:
            return count


def test_texts_that_do_not_fit_or_get_no_latent(lab: Lab, corpus: Path, tmp_path: Path, model: Path) -> None:
    options = [
        *slow(model),
        "--max-length",
        "16",
        "--shard-size",
        "3",
        "--max-samples",
        "60",
        "--encode-fraction",
        "0.5",
    ]
    done = lab.run(tmp_path / "out", corpus, *options)
    assert done.returncode == 0, done.stderr
    assert ": 0 rows\n" in done.stderr  # a shard of long texts alone
    assert content(tmp_path / "out") == without_ray(lab, tmp_path / "plain", corpus, *options)


def test_real_sentence_transformers_on_a_cluster_of_its_own(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: make test-ray")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    vocabulary = {
        word: number for number, word in enumerate(["?", *sorted(set(re.findall(r"\w+", corpus.read_text())))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    library.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu").save(
        str(tmp_path / "model")
    )
    lab = Lab("local", lab.environment | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    options = slow(tmp_path / "model")
    done = lab.run(tmp_path / "out", corpus, *options)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == without_ray(lab, tmp_path / "plain", corpus, *options)


def test_mistakes_are_named_in_one_line(lab: Lab, corpus: Path, tmp_path: Path, model: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text('{"text": "one"}\n{"body": "two"}\n')
    command = lab.command(out, source, *LSA)
    with_ray, without = run(lab, command), run(lab, command[:-2])
    assert with_ray.returncode == without.returncode == ExitCode.FAILED
    assert problem(with_ray) == problem(without)
    assert f"{source}:2: no text under the key 'text'" in problem(without)

    (model / "broken").touch()
    done = lab.run(out, corpus, *slow(model))
    assert done.returncode == ExitCode.FAILED
    assert problem(done) == f"error: --encoder-model {model}: cannot be loaded (no weights here)"

    for address, said in {
        "ray://127.0.0.1:10001": "a client outside of the cluster cannot do this; start",
        "127.0.0.1:1": "no cluster to use ([Errno 111] Connection refused)",
        "nowhere": "no cluster to use (",
    }.items():
        done = lab.run(tmp_path / "nothing", corpus, *LSA, ray=address)
        assert done.returncode == ExitCode.FAILED
        assert problem(done).startswith(f"error: --ray {address}: {said}")
        assert not (tmp_path / "nothing").exists()


def test_processes_that_share_the_work_do_not_each_go_to_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepare.main(["--out", str(tmp_path / "out"), "--ray"]) == ExitCode.USAGE
    assert "--ray: this is one of 2 processes that share the work" in capsys.readouterr().err


def test_gpus_of_an_actor() -> None:
    """One for a model where there are any; what is asked for, in any case."""
    plan = {"encoder": {"name": "sentence_transformers"}}
    none = {"CPU": 8.0}
    four = {**none, "GPU": 4.0}
    asked = LocalOptions(None, False, None, "", None, None)
    assert gpus_of_actor(asked, plan, none) == 0
    assert gpus_of_actor(asked, plan, four) == 1
    assert gpus_of_actor(replace(asked, encoder_device="cpu"), plan, four) == 0
    assert gpus_of_actor(replace(asked, encoder_device="cuda"), plan, none) == 1
    assert gpus_of_actor(replace(asked, ray_gpus_per_actor=0.5), plan, none) == 0.5
    assert gpus_of_actor(asked, {"encoder": {"name": "lsa"}}, four) == 0
