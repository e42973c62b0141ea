"""The fused residual streams are those of the package."""

from __future__ import annotations

import pytest
import torch
from hyper_connections.mHCv2 import ManifoldConstrainedHyperConnections, sinkhorn_knopps
from hypothesis import given, settings
from hypothesis import strategies as st

from job.model.streams import read, sinkhorn, write


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=4, max_size=4))
def test_sinkhorn_of_two_streams(entries: list[float]) -> None:
    logits = torch.tensor(entries).view(1, 2, 2)
    found = sinkhorn(logits, None)
    torch.testing.assert_close(found, sinkhorn_knopps(logits, iters=2000), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2))
    torch.testing.assert_close(found.sum(-2), torch.ones(1, 2))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("for_a_compiler", [False, True])
def test_read_and_write(monkeypatch: pytest.MonkeyPatch, count: int, for_a_compiler: bool) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: for_a_compiler)
    torch.manual_seed(0)
    connection = ManifoldConstrainedHyperConnections(count, dim=8)
    for p in connection.parameters():
        p.data += 0.3 * torch.randn_like(p)
    streams, branch_weight = torch.randn(5, count, 8, requires_grad=True), torch.randn(8, 8)
    inputs = [streams, *connection.parameters()]
    x, add = connection(streams[None])
    expected = add(x @ branch_weight)[0]
    y, weights = read(connection, streams)
    found = write(streams, weights, y @ branch_weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    outer = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * outer).sum(), inputs),
        torch.autograd.grad((expected * outer).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_streams_are_never_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    allowed: list[bool] = []
    bmm = torch.bmm

    def watched(*matrices: torch.Tensor) -> torch.Tensor:
        allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return bmm(*matrices)

    monkeypatch.setattr(torch, "bmm", watched)
    try:
        connection = ManifoldConstrainedHyperConnections(2, dim=8)
        branch, mixing = read(connection, torch.randn(3, 2, 8, requires_grad=True))
        write(torch.randn(3, 2, 8), mixing, branch).sum().backward()
        assert allowed
        assert not any(allowed)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
