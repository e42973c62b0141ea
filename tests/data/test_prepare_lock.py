"""One preparation at a time in a directory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from job.data.lock import LOCK_FILE, held, is_held_for
from job.errors import UserError


def hold(directory: Path, run: str, is_ready: multiprocessing.synchronize.Event) -> None:
    with held(directory, run):
        is_ready.set()
        signal.pause()


def test_a_second_one_is_refused_at_once_and_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    is_ready = context.Event()
    process = context.Process(target=hold, args=(out, "first", is_ready))
    process.start()
    assert is_ready.wait(60)
    with (
        pytest.raises(UserError, match=rf"another preparation is at work here \(process {process.pid} on "),
        held(out, "second"),
    ):
        pass
    assert is_held_for(out, "first")
    assert not is_held_for(out, "second")
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with held(out, "second"):
        assert is_held_for(out, "second")
    assert not any(out.iterdir())
    with held(tmp_path / "new", "run"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was made in it


def test_what_is_there_stays(tmp_path: Path) -> None:
    with held(tmp_path, "run"):
        (tmp_path / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ZeroDivisionError), held(empty, "run"):
        _ = 1 / 0
    assert empty.is_dir()
    assert not (empty / LOCK_FILE).exists()
