"""The benchmark runs, its settings do the same work, and its count of operations is right."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.benchmark import main, setting
from job.benchmarking import measure
from job.benchmarking.measure import Case, Shape
from job.benchmarking.paper import count, starts_kernel
from job.benchmarking.profiling import covered
from job.benchmarking.report import exponent
from job.command import guarded
from job.config import ModelConfig
from job.errors import UsageError
from job.monitoring.flops import pass_flops

CPU = torch.device("cpu")
SMALL = shlex.split("""
    --set model.hidden_size=32 model.n_blocks=2 model.cond_dim=32
    --batch 2 --seq-len 16 --vocab 64 --latent-dim 8 --repeats 2 --device cpu
""")


def test_plain_and_fast_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--fill", "0.6", "--out", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    plain, fast = figures["model.implementation=plain"], figures["model.implementation=fast"]
    assert plain["first_loss"] == pytest.approx(fast["first_loss"], rel=1e-5)
    assert plain["speedup"] == 1
    assert fast["flops_per_step"] == plain["flops_per_step"] > 0
    assert sum(fast["parts"].values()) == pytest.approx(fast["step_seconds"], rel=1)
    assert 0 < fast["mfu"] < 1
    assert fast["peak_memory_gib"] > 0
    assert "\nfast " in capsys.readouterr().out


def test_a_profile_tells_what_takes_the_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--compare", "model.implementation=fast", "--profile", "3", "--out", str(tmp_path / "figures.json")])
    seconds = json.loads((tmp_path / "figures.json").read_text())["figures"]["model.implementation=fast"]
    totals = sorted((sum(of_kernel) for of_kernel in seconds.values()), reverse=True)
    assert len(seconds["aten::_fused_adamw_"]) == 2  # with and without weight decay: of one step
    out, err = capfd.readouterr()
    assert "profiler_start" not in err
    lines = out.splitlines()[-3:]
    assert [float(line.split()[0]) for line in lines] == pytest.approx([1e3 * total for total in totals[:3]], abs=0.01)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), min_size=1))
def test_what_runs_at_once_is_busy_once(begun: list[tuple[int, int]]) -> None:
    spans = [(float(start), float(start + length)) for start, length in begun]
    ticks = {tick for start, length in begun for tick in range(start, start + length)}
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    assert covered(spans) == (len(ticks), whole)


def test_the_stock_model_computes_the_same_by_flash_attention_in_compiled_blocks() -> None:
    shape = Shape(2, 16, 64, 8, 0.6)
    cases = [
        Case(setting(["model.hidden_size=32", "model.n_blocks=1", "model.cond_dim=32"], name, shape), shape, CPU)
        for name in ("model.implementation=plain", "model.implementation=plain,baseline=stock")
    ]
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute
        losses = [case.step()[1] for case in cases]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    blocks: list[Any] = [case.objective.model.get_submodule("mmdit.blocks.0") for case in cases]
    assert [block.joint_attn.attend.flash for block in blocks] == [False, True]
    assert [block._compiled_call_impl is not None for block in blocks] == [False, True]


def test_on_a_gpu_the_host_waits_only_after_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        setting(["model.hidden_size=32", "model.n_blocks=1"], "", Shape(2, 16, 64, 8, 1)), Shape(2, 16, 64, 8, 1), CPU
    )
    waits: list[str] = []
    monkeypatch.setattr(case, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    monkeypatch.setattr(measure, "autocast", lambda *_: nullcontext())
    assert case.seconds() > 0
    assert len(waits) == 2


@pytest.mark.parametrize("name", ["model.implementation=plain,baseline=mine", "baseline=stock"])
def test_a_baseline_that_is_not_there_is_refused(name: str) -> None:
    shape = Shape(2, 16, 64, 8, 0.6)
    with pytest.raises(UsageError, match="baseline="):
        Case(setting(["model.hidden_size=32", "model.n_blocks=1"], name, shape), shape, CPU)


def test_the_utilization_is_of_the_peak_that_is_given() -> None:
    shape = Shape(1, 16, 64, 8, 1.0)
    values = setting(["model.hidden_size=32", "model.n_blocks=1", "model.cond_dim=32"], "", shape)
    figures = measure.compare({"mine": values}, shape, CPU, repeats=1, peak=1e6)["mine"]
    assert figures["mfu"] == pytest.approx(figures["flops_per_second"] / 1e6)


def test_row_lengths_have_the_mean_asked_for() -> None:
    assert Shape(4, 100, 64, 8, 1.0).lengths() == [100] * 4
    lengths = Shape(8, 100, 64, 8, 0.6).lengths()
    assert sum(lengths) / 8 == pytest.approx(60, abs=1)
    assert min(lengths) < 40
    assert max(lengths) <= 100


def test_exponent() -> None:
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_cost_along_the_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--grow", "ranks", "--values", "1", "2", "--compare", "model.implementation=fast"])
    assert "2 ranks: model.implementation=fast" in capsys.readouterr().out


def test_a_setting_that_is_killed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure.CaseProcess, "step", lambda case: case._pool.submit(os._exit, 9).result())
    assert guarded(lambda: main(SMALL)) == 1
    assert capsys.readouterr().err == (
        "error: a setting's process was killed, most likely for its memory; choose smaller sizes\n"
    )


def test_a_gpu_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert guarded(lambda: main([*SMALL, "--device", "cuda"])) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: --device cuda: PyTorch sees no GPU here")
    assert len(printed.err.splitlines()) == 1


def test_views_start_no_kernel_and_what_resembles_their_names_does() -> None:
    aten = torch.ops.aten
    for free in (aten.t.default, aten.view.default, aten.slice.Tensor, aten.empty_like.default, torch.ops.prim.device):
        assert not starts_kernel(getattr(free, "default", free)), free
    for kernel in (
        aten.cat.default,
        aten.sqrt.default,
        aten.repeat.default,
        aten.bitwise_not.default,
        aten.slice_backward.default,
        aten.select_backward.default,
    ):
        assert starts_kernel(kernel), kernel


def test_paper_counts_the_operations_that_a_step_needs() -> None:
    shape = Shape(2, 128, 2048, 16, 1.0)
    size = ["model.hidden_size=64", "model.n_blocks=2", "model.cond_dim=64", "model.num_residual_streams=1"]
    plain, fast = (
        count(setting([*size, f"model.implementation={kind}"], "", shape), shape) for kind in ("plain", "fast")
    )
    needed = pass_flops(ModelConfig(hidden_size=64, n_blocks=2, cond_dim=64), np.array([128, 128]), 2048, 16)
    assert fast["flops"] == pytest.approx(2 * needed["t2l"] + 2 * needed["l2t"], rel=0.1)
    assert plain["flops"] > fast["flops"]
    assert plain["kernels"] > fast["kernels"]
    assert plain["peak_gib"] > fast["peak_gib"] > 0


@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_one_line(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert guarded(lambda: main([*SMALL, "--device", device])) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith(f"error: --device {device}: ")
    assert len(said.splitlines()) == 1


def test_a_directory_in_the_place_of_the_figures_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: main([*SMALL, "--out", str(tmp_path)])) == 2
    assert f"--out {tmp_path}: is a directory" in capsys.readouterr().err
