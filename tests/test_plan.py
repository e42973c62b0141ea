"""`cyclevae plan`: what it counts is what a run then has."""

from __future__ import annotations

import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_run import TINY, tiny_run

from job import checkpoint_names
from job import plan as plan_command
from job.command import composed, guarded
from job.plan import main
from job.planning import batches
from job.planning import plan as plan_module
from job.planning.batches import LARGEST, largest_fitting, tried
from job.planning.counts import peak_on_paper
from job.planning.data import planned_data
from job.planning.plan import duration, flop
from job.runtime.checkpoint import open_checkpoint, read_weights

SYNTHETIC = ["data=synthetic", *TINY]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(
    scope="module", params=[[], ["training.ema_decay=0.9", "model.num_residual_streams=1"]], ids=["", "average"]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    return tiny_run(tmp_path_factory.mktemp("planned") / "run", prepared, *request.param)


def test_parameters_and_checkpoints_are_those_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.load(run / "config.yaml")
    keys = [f"data.dir={config.data.dir}", f"training.ema_decay={config.training.ema_decay}"]
    keys.append(f"model.num_residual_streams={config.model.num_residual_streams}")
    plan = planned(capsys, *TINY, *keys)
    weights = read_weights(open_checkpoint(run), "model.")
    averaged = read_weights(open_checkpoint(run), "optimizer.average.")
    shares = list((run / checkpoint_names.DIRECTORY).glob("step_*/share_*"))
    assert plan["checkpoint_bytes"] == sum(path.stat().st_size for path in shares)
    assert plan["bytes"]["weights"] == sum(tensor.nbytes for tensor in weights.values())
    assert plan["bytes"]["average"] == sum(tensor.nbytes for tensor in averaged.values())
    assert plan["parameters"] == sum(plan["parameters_by_part"].values()) <= sum(t.numel() for t in weights.values())
    log = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    rate = [line["tokens_per_second"] * line["step_seconds"] for line in log]
    assert plan["tokens_per_step"] == pytest.approx(sum(rate) / len(rate), rel=0.1)
    # As the run counts them for its utilization, over the rows that it saw.
    flops = json.loads((run / "goodput.json").read_text())["flops"]
    assert plan["flops_per_step"] * plan["steps"] == pytest.approx(flops, rel=0.15)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a step on paper takes seconds; here a row takes a tenth of a GiB."""
    for module in (plan_command, plan_module):
        monkeypatch.setattr(module, "peak_on_paper", lambda _, __, rows: 2**30 * (1 + rows / 10))


def test_the_largest_batch_is_found_in_a_few_trials() -> None:
    asked = []

    def peak(rows: int) -> float | None:
        asked.append(rows)
        return None if rows > 500 else 10.0 + 0.7 * rows + 0.0002 * rows**2

    for limit, expected in ((100.0, 124), (1000.0, 500), (10.0, 0)):
        asked.clear()
        rows, _ = largest_fitting(peak, limit)
        assert expected * 0.95 <= rows <= expected
        assert len(asked) <= 12
    assert largest_fitting(lambda rows: 1.0 + rows, 1e9)[0] == LARGEST, "where memory is no limit"


@pytest.mark.usefixtures("quick")
def test_a_trial_is_of_real_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One in a process of its own; its memory is the program's and what is counted on paper."""
    config = composed("mmdit_cycle_vae", SYNTHETIC)
    data = planned_data(config, None)
    measured = tried(config, data, torch.device("cpu"))(4)
    assert measured is not None
    assert peak_on_paper(config, data, 4) < measured < 2 * 2**30

    def killed(*_: object) -> float:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(batches, "peak_memory", killed)
    assert tried(config, data, torch.device("cpu"))(4) is None
    monkeypatch.setattr(batches, "peak_memory", lambda _, shape, __: 0.1 + 0.01 * shape.batch)
    main([*SYNTHETIC, "--try", "--memory-gib", "1", "--json"])
    told = capsys.readouterr()
    plan = json.loads(told.out)
    assert told.err.startswith("tried 1 rows: 0.11 GiB\ntried 4 rows: 0.14 GiB\n")
    assert plan["largest_batch"]["measured"]
    assert plan["largest_batch"]["rows"] == 80
    assert plan["measured_peak_bytes"]["80"] == pytest.approx(0.9 * 2**30)


@pytest.mark.usefixtures("quick")
def test_time_and_batch_of_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["model.vocab_size=1000", "model.latent_dim=8", *TINY, "--mean-tokens", "10"]
    plan = planned(capsys, *keys, "--device", "H100", "--mfu", "0.5", "--ranks", "2")
    assert plan["tokens_per_step"] == 2 * 16 * 10
    assert plan["seconds"] == pytest.approx(6 * plan["flops_per_step"] / (2 * 0.5 * 989e12))
    assert plan["samples_per_step"] == 32
    assert not plan["largest_batch"]["measured"]
    assert plan["largest_batch"]["rows"] == int(10 * (0.9 * 79.1 - 1))
    given = planned(capsys, *keys, "--tokens-per-second", "64")
    assert given["seconds"] == 15


@pytest.mark.usefixtures("quick")
def test_shards_divide_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    whole = planned(capsys, *SYNTHETIC, "--ranks", "4")
    sharded = planned(capsys, *SYNTHETIC, "--ranks", "4", "training.strategy=fsdp")
    state = sum(whole["bytes"].values())
    assert whole["peak_bytes"] - sharded["peak_bytes"] == pytest.approx(state * 3 / 4, rel=0.01)


@pytest.mark.usefixtures("quick")
def test_the_plan_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SYNTHETIC, "--ranks", "2", "training.global_batch_size=64", "logging.keep_every=3"])
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == [
        "model",
        "data",
        "step",
        "run",
        "memory",
        "gradients",
        "checkpoint",
    ]
    assert "64 texts (2 x 16 rows x 2 passes)" in told
    assert "keep_last=2, 2 of keep_every and the one being written" in told
    assert duration(90_000) == "1 d 1 h"
    assert duration(7500) == "2 h 5 min"
    assert flop(2.5e15) == "2.5 PFLOP"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        ([], "data.dir is not set", 1),
        (["data.dir=/nowhere"], "data.dir=/nowhere: no such directory here; prepare the data, or say its size", 1),
        (["data=synthetic", "--device", "H1"], "--device H1: known are B200, H200", 2),
        (["data=synthetic", "--mfu", "2"], "it is a share", 2),
        (["data=synthetic", "--memory-gib", "0"], "--memory-gib 0: give more than 0", 2),
        (["data=synthetic", "--rank", "0"], "--ranks 0: give at least 1", 2),
        (["data=synthetic", "/tmp"], "/tmp: a plan is of a run that is still to be started", 2),
        (["demo"], "demo: not of the form KEY=VALUE", 2),
        (["data=synthetic", "--fast"], "--fast: no such option", 2),
        (["data=synthetic", "model.hiden_size=3"], "did you mean model.hidden_size", 2),
        (["data=synthetic", "+model.x=3"], "unknown configuration key model.x", 2),
        (["data=synthetic", "model.n_blocks=0"], "model.n_blocks=0: give a value of more than 0", 1),
        (["data=synthetic", "training.global_batch_size=9"], "is not a multiple of training.train_batch_size=8", 1),
        ([*SYNTHETIC, "--memory-gib", "1e-6"], "not even one row fits", 1),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(
    arguments: list[str], words: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: main(arguments)) == code
    told = capsys.readouterr()
    assert words in told.err
    assert len(told.err.splitlines()) == 1
