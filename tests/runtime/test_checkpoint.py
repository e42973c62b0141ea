from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.checkpoint_names import COMMIT_FILE, steps
from job.config import Config
from job.errors import UserError
from job.files import storage_problem
from job.runtime.checkpoint import open_checkpoint, read_weights
from job.runtime.checkpointer import Checkpointer
from job.runtime.distributed import Process
from job.runtime.resume import find_checkpoint
from job.runtime.tensorfile import DTYPES, flatten
from job.trained import open_saved

ALONE = Process(0, 0, 1, torch.device("cpu"), "here")
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def checkpointer(
    directory: Path, log: list[str] | None = None, *, keep_last: int = 2, keep_every: int = 0
) -> Checkpointer:
    return Checkpointer(
        directory, ALONE, keep_last=keep_last, keep_every=keep_every, log=(log if log is not None else []).append
    )


def state(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    model = {
        "embed.weight": torch.randn(40, 8, generator=generator),
        "norm": torch.randn(8, generator=generator),
        "scale": torch.tensor(float(seed)),
    }
    return {
        "model": model,
        "adam": {name: {"exp_avg": torch.randn(t.shape, generator=generator)} for name, t in model.items()},
    }


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Equal names, types and bits."""
    a, b = dict(flatten(one)), dict(flatten(two))
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and a[n].contiguous().view(-1).view(torch.uint8).equal(b[n].contiguous().view(-1).view(torch.uint8))
        for n in a
    )


@quick
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=8
    ),
    seed=st.integers(0, 999),
)
def test_every_type_and_shape_comes_back_bit_for_bit(
    tmp_path: Path, shapes: list[tuple[torch.dtype, list[int]]], seed: int
) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {}
    for i, (dtype, shape) in enumerate(shapes):
        size = dtype.itemsize * math.prod(shape)
        raw = torch.randint(
            0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator
        )  # any bits: NaNs, -0.0, denormals
        tensors[f"t{i}"] = {"x": raw.view(dtype).view(shape)}
    c = checkpointer(tmp_path / "c")
    c.save(7, tensors, {"step": 7}, blocking=True)
    assert c.wait()
    found = c.newest_valid()
    assert found is not None
    back = {name: {"x": torch.empty_like(value["x"])} for name, value in tensors.items()}
    assert c.load(found, back) == {"step": 7}
    assert same(back, tensors)
    assert same(read_weights(found), dict(flatten(tensors)))


def test_the_next_steps_do_not_reach_a_save_in_progress(tmp_path: Path) -> None:
    c, tensors = checkpointer(tmp_path), {"w": torch.full((1 << 22,), 1.0).t()}
    c.save(1, tensors, {})
    tensors["w"].fill_(2.0)
    assert c.wait()
    assert read_weights(open_checkpoint(tmp_path))["w"].eq(1.0).all()


def test_views_and_transposes_are_saved_as_they_look(tmp_path: Path) -> None:
    c, base = checkpointer(tmp_path), torch.arange(12.0).view(3, 4)
    c.save(1, {"t": base.t(), "s": base[:, ::2]}, {}, blocking=True)
    back = read_weights(open_checkpoint(tmp_path))
    assert back["t"].equal(base.t())
    assert back["s"].equal(base[:, ::2])


def flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 4
    path.write_bytes(bytes(data))


DAMAGE = {
    "truncated share": (lambda d: os.truncate(next(d.glob("share*")), 100), "bytes, not"),
    "longer share": (lambda d: next(d.glob("share*")).open("ab").write(b"0"), "bytes, not"),
    "bit flip in header": (lambda d: flip(next(d.glob("share*")), 0.01), "is damaged"),
    "bit flip at the end": (lambda d: flip(next(d.glob("share*")), 1.0), "is damaged"),
    "missing share": (lambda d: next(d.glob("share*")).unlink(), "is missing"),
    "missing commit": (lambda d: (d / COMMIT_FILE).unlink(), "commit.json is missing"),
    "empty commit": (lambda d: os.truncate(d / COMMIT_FILE, 0), "commit.json is damaged"),
    "other record": (
        lambda d: (d / COMMIT_FILE).write_text((d / COMMIT_FILE).read_text().replace('"lr": 0.5', '"lr": 0.6')),
        "commit.json is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_skipped_and_left_alone(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    c = checkpointer(tmp_path)
    for step in (10, 20):
        c.save(step, state(step), {"lr": 0.5}, blocking=True)
    action, words = DAMAGE[damage]
    action(tmp_path / "step_00000020")
    log: list[str] = []
    again = checkpointer(tmp_path, log)
    found = again.newest_valid()
    assert found is not None
    assert found.step == 10
    assert len(log) == 1
    assert "step_00000020" in log[0]
    assert words in log[0]
    assert (tmp_path / "step_00000020").is_dir()
    back = state(0)
    again.load(found, back)
    assert same(back, state(10))
    with pytest.raises(UserError, match=words):
        open_checkpoint(tmp_path / "step_00000020")
    capsys.readouterr()
    assert open_checkpoint(tmp_path).step == 10
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {tmp_path}/step_00000020: ")
    assert words in told
    assert told.endswith("; step 10 is taken instead\n")
    again.save(20, state(21), {}, blocking=True)  # the run comes by again
    assert open_checkpoint(tmp_path).step == 20


@quick
@given(position=st.floats(0, 1), which=st.integers(0, 1))
def test_any_flipped_bit_is_found(tmp_path: Path, position: float, which: int) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    checkpointer(tmp_path / "c").save(1, state(1), {"seed": 1}, blocking=True)
    flip(sorted((tmp_path / "c" / "step_00000001").iterdir())[which], position)
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(tmp_path / "c" / "step_00000001")


@quick
@given(
    keep_last=st.integers(1, 3),
    keep_every=st.sampled_from([0, 2, 3]),
    gaps=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    damaged=st.sets(st.integers(0, 8)),
    restart=st.integers(0, 8),
)
def test_retention(
    tmp_path: Path, keep_last: int, keep_every: int, gaps: list[int], damaged: set[int], restart: int
) -> None:
    """The keep_last newest valid ones and multiples of keep_every stay, also across damage and a restart."""
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    c, step = checkpointer(tmp_path / "c", keep_last=keep_last, keep_every=keep_every), 0
    saved: list[int] = []
    broken: set[int] = set()
    for i, gap in enumerate(gaps):
        step += gap
        c.save(step, {"w": torch.tensor(step)}, {}, blocking=True)
        assert c.wait()
        saved = [s for s in saved if s != step] + [step]
        there = {int(p.name[5:]) for p in (tmp_path / "c").glob("step*")}
        valid = [s for s in saved if s not in broken]
        wanted = set(valid[-keep_last:]) | {s for s in valid if keep_every and s % keep_every == 0}
        assert there - broken == wanted
        if i in damaged:
            (tmp_path / "c" / f"step_{step:08d}" / COMMIT_FILE).unlink()
            broken.add(step)
        if i == restart or i in damaged:
            c = checkpointer(tmp_path / "c", keep_last=keep_last, keep_every=keep_every)
            found = c.newest_valid()
            assert (found.step if found else None) == max((s for s in wanted if s not in broken), default=None)


def test_going_back_to_an_earlier_step_removes_no_later_one_and_keeps_what_it_saves(tmp_path: Path) -> None:
    c = checkpointer(tmp_path, keep_last=2)
    for step in (20, 30):
        c.save(step, state(step), {}, blocking=True)
    back = checkpointer(
        tmp_path, keep_last=2
    )  # training.resume=PATH of an earlier step: it was not asked for the newest
    for step in (11, 12, 13):
        back.save(step, state(step), {}, blocking=True)
    assert [path.name for path in sorted(tmp_path.glob("step*"))] == [
        "step_00000012",
        "step_00000013",
        "step_00000020",
        "step_00000030",
    ]


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(tmp_path: Path) -> None:
    c = checkpointer(tmp_path)
    c.save(1, {"model": {"a": torch.ones(2, 3), "b": torch.ones(1), "gone": torch.ones(1)}}, {}, blocking=True)
    found = c.newest_valid()
    assert found is not None
    here = {"model": {"a": torch.zeros(3, 2), "b": torch.zeros(1), "new": torch.zeros(1)}}
    with pytest.raises(UserError) as caught:
        c.load(found, here)
    message = str(caught.value)
    assert "\n" not in message
    for words in ("model.a is F32 [2, 3] there, F32 [3, 2] here", "model.new is missing", "model.gone is unknown here"):
        assert words in message
    assert here["model"]["b"].item() == 0


def test_leaf_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"optimizer\.lr is no tensor"):
        checkpointer(tmp_path).save(1, {"optimizer": {"lr": 0.1}}, {})


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert checkpointer(tmp_path / "new").newest_valid() is None
    with pytest.raises(UserError, match="not a valid checkpoint"):
        open_checkpoint(tmp_path / "new")


def test_saving_the_same_step_again_writes_nothing(tmp_path: Path) -> None:
    c = checkpointer(tmp_path)
    c.save(3, state(3), {}, blocking=True)
    before = (tmp_path / "step_00000003" / COMMIT_FILE).stat().st_ino
    again = checkpointer(tmp_path)
    assert again.newest_valid() is not None
    again.save(3, state(3), {}, blocking=True)
    assert again.wait()
    assert (tmp_path / "step_00000003" / COMMIT_FILE).stat().st_ino == before


def test_weights_by_prefix_and_run_directory(tmp_path: Path) -> None:
    c = checkpointer(tmp_path / "run" / "checkpoints")
    c.save(1, state(1), {"config": {"a": 1}}, blocking=True)
    c.save(2, state(2), {"config": {"a": 1}}, blocking=True)
    found = open_checkpoint(tmp_path / "run")
    assert (found.step, found.record) == (2, {"config": {"a": 1}})
    assert same(read_weights(found, "model."), state(2)["model"])
    assert (
        json.loads((found.path / COMMIT_FILE).read_text())["commit"]["files"][0]["name"]
        == "share_00000_of_00001.safetensors"
    )


@pytest.mark.parametrize("action", ["refused", "set aside"])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_trained_over(tmp_path: Path, action: str) -> None:
    c = checkpointer(tmp_path)
    for step in (10, 20):
        c.save(step, state(step), {}, blocking=True)
        os.truncate(next((tmp_path / f"step_000000{step}").glob("share*")), 100)
    config, again = Config(), checkpointer(tmp_path)
    if action == "refused":
        for resume in ("auto", str(tmp_path / "elsewhere")):
            config.training.resume = resume
            with pytest.raises(UserError, match=r"none of the 2 checkpoints is valid.*training\.resume=never"):
                find_checkpoint(config, again)
        assert len(list(tmp_path.glob("step_*/share*"))) == 2
    else:
        config.training.resume = "never"
        assert find_checkpoint(config, again) is None
        again.save(10, state(10), {}, blocking=True)
        assert open_checkpoint(tmp_path).step == 10
        assert len(list(tmp_path.glob("damaged_step_*/share*"))) == 2


def test_a_file_in_the_place_of_the_checkpoints_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints: is a file where a directory is needed"):
        checkpointer(tmp_path / "checkpoints").refuse_unwritable()
    checkpointer(tmp_path / "good").refuse_unwritable()


def test_checkpoints_that_may_not_be_listed_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode that forbids it would not keep root out."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError) as failed:
        open_saved(tmp_path)
    assert storage_problem(failed.value) == f"{tmp_path}/checkpoints: Permission denied"


def test_a_directory_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert steps(tmp_path / "none") == steps(tmp_path / "file") == steps(tmp_path / "file" / "none") == []
