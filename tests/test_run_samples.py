"""samples.jsonl: the same texts at every step, the same lines whatever ended the run, and no trace in the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import configured, tiny_run

from job.errors import ExitCode
from job.files import json_lines
from job.run_samples import is_due
from job.runtime import checkpointer
from job.train import train
from job.trained import load_trained

SAMPLED = ["logging.num_samples=3", "logging.sample_freq=2", "logging.eval_freq=4", "logging.log_freq=1"]
CANDIDATES = ["decoding.candidates=2", "decoding.temperature=0.9"]


@pytest.fixture(scope="module")
def sampled(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "sampled", prepared, *SAMPLED, *CANDIDATES)


def test_the_same_texts_at_every_step_and_at_the_end(sampled: Path) -> None:
    lines = json_lines(sampled / "samples.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    texts = [[sample["text"] for sample in line["samples"]] for line in lines]
    assert len(texts[0]) == 3
    assert texts[0] == texts[1] == texts[2]
    assert all(set(sample) == {"text", "l2t", "t2l2t"} for line in lines for sample in line["samples"])
    assert lines[0]["samples"] != lines[2]["samples"]  # the model learned in between
    shown = (sampled / "samples.txt").read_bytes().decode()  # texts may hold any kind of line end
    for sample in lines[-1]["samples"]:
        assert sample["text"] in shown
        assert sample["t2l2t"] in shown


def test_training_is_the_same_without_samples(sampled: Path, prepared: Path, tmp_path: Path) -> None:
    without = tiny_run(tmp_path / "without", prepared, *SAMPLED, *CANDIDATES, "logging.sample_freq=0")
    assert not (without / "samples.jsonl").exists()
    assert (without / "samples.txt").read_text() == (sampled / "samples.txt").read_text()
    for key in ("loss", "grad_norm"):
        with_samples, alone = (
            [line[key] for line in json_lines(run / "training_log.jsonl")] for run in (sampled, without)
        )
        assert with_samples == alone
    weights, others = load_trained(sampled).weights, load_trained(without).weights
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_by_default_there_is_a_line_with_every_evaluation(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run", prepared, "logging.eval_freq=4", "logging.num_samples=2")
    steps = [line["step"] for line in json_lines(run / "samples.jsonl")]
    assert steps == [line["step"] for line in json_lines(run / "evaluation.jsonl")] == [4, 6]
    said = capsys.readouterr().out
    text = json_lines(run / "samples.jsonl")[0]["samples"][0]["text"]
    assert f"sample at step 4\ntext   {text}\nL2T    " in said


class Killed(BaseException):
    """The end of a process, as far as its files are concerned."""


@pytest.mark.parametrize("when", ["before the save", "after the save"])
def test_a_run_that_is_killed_writes_every_line_once(
    when: str, sampled: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 4: its samples are written, and either belong to the checkpoint that the run goes on from, or do not."""
    config = configured(f"data.dir={prepared}", *SAMPLED, *CANDIDATES, "logging.save_freq=2")
    run, save = tmp_path / "run", checkpointer.Checkpointer.save

    def killed_at_4(self: checkpointer.Checkpointer, step: int, *arguments: object, **keywords: object) -> None:
        if step < 4 or when == "after the save":
            save(self, step, *arguments, **(keywords | {"blocking": True}))  # type: ignore[arg-type]
        if step == 4:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer.Checkpointer, "save", killed_at_4)
        with pytest.raises(Killed):
            train(config, run)
    assert [line["step"] for line in json_lines(run / "samples.jsonl")] == [2, 4]
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "sam')  # cut short
    assert train(config, run) == ExitCode.FINISHED
    assert (run / "samples.jsonl").read_text() == (sampled / "samples.jsonl").read_text()


def test_lines_that_are_lost_are_made_again(sampled: Path, prepared: Path, tmp_path: Path) -> None:
    """The run was stopped at step 4, and its directory copied without the file."""
    run = tmp_path / "run"
    stopped = configured(f"data.dir={prepared}", *SAMPLED, *CANDIDATES, "training.num_train_steps=4")
    assert train(stopped, run) == ExitCode.FINISHED
    (run / "samples.jsonl").unlink()
    longer = configured(
        f"data.dir={prepared}", *SAMPLED, *CANDIDATES, "training.allow_changed=[training.num_train_steps]"
    )
    assert train(longer, run) == ExitCode.FINISHED
    assert [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()] == [4, 6]
    shutil.rmtree(run)


def test_what_is_due_is_due_at_the_end_too() -> None:
    assert [step for step in range(1, 8) if is_due(3, step, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if is_due(0, step, 7)] == [7]
