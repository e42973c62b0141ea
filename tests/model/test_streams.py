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
def test_read_and_write(count: int) -> None:
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
