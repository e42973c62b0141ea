"""The examples run from the first to the last line, with a run and without its data."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_run

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_example_of_using_a_model_runs(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    run = tiny_run(tmp_path / "run", data, "training.num_train_steps=2")
    shutil.rmtree(data)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["use_a_model.py", str(run)])
    names = runpy.run_path(str(EXAMPLES / "use_a_model.py"))
    assert names["latents"].shape == (4, 8)
    assert names["model"].trained.path == run
    np.testing.assert_allclose(names["way"][[0, -1]], names["latents"][[0, 2]], rtol=1e-5)
    lengths = np.linalg.norm(names["way"], axis=1)
    assert (np.diff(lengths) > 0).all() or (np.diff(lengths) < 0).all() or np.allclose(lengths, lengths[0], rtol=1e-3)
    np.testing.assert_allclose(np.diag(names["alike"]), 1, rtol=1e-5)
    printed = capsys.readouterr().out
    assert printed.count("to its true latent") == 4
    assert printed.startswith("2 steps, latents of 8 dimensions, texts of up to 32 tokens\n")
