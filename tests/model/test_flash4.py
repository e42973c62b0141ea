"""Without a GPU for it FlashAttention 4 is left alone; what it computes is tested on one (tests/gpu)."""

from __future__ import annotations

import pytest
import torch

from job.model import flash4
from job.model.flash4 import flash4_serves


def test_a_cpu_attends_without_it() -> None:
    assert not flash4_serves(torch.empty(2, 1, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("size", "capability", "is_installed"), [(64, (8, 0), True), (64, (9, 0), False), (68, (9, 0), True)]
)
def test_what_it_was_not_made_for_is_not_tried(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: int,
    capability: tuple[int, int],
    is_installed: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(flash4, "_is_installed", lambda: is_installed)
    assert not flash4._works.__wrapped__(torch.device("cuda"), torch.bfloat16, size)
    assert capsys.readouterr().err == ""


def test_one_that_does_not_run_is_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(flash4, "_is_installed", lambda: True)
    assert not flash4._works.__wrapped__(torch.device("cpu"), torch.bfloat16, 64)
    told = capsys.readouterr().err
    assert told.startswith("warning: flash-attn-4 is installed but does not run here (")
    assert told.endswith("or remove it\n")
    assert told.count("\n") == 1
