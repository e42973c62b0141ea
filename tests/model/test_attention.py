"""Attention with the latents added by kernels is softmax attention over the tokens and the latent of each row."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objective_cases import formula_batch, formula_model, model_config
from torch import Tensor

from job.model import attention, fused_blocks, sublayer
from job.model.attention import Attended, attend_full
from job.model.fast import FastMMDiT
from job.model.groups import Group, Padding

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
        reason="not by Triton's interpreter: make test-kernels",
    ),
]


class OnCPU:
    """PyTorch's flash attention for CPUs, in the place of cuDNN's."""

    @staticmethod
    def forward(*heads: Tensor) -> Attended:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
        return Attended(out, lse, (7,))

    @staticmethod
    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended) -> tuple[Tensor, ...]:
        assert attended.rest == (7,)
        backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(gradient, q, k, v, attended.out, attended.lse, 0.0, False)


def by_softmax(text: Tensor, latent: Tensor, gains: list[Tensor] | None, n_heads: int) -> tuple[Tensor, Tensor]:
    rows = len(latent)
    parts = [x.view(rows, -1, 3, n_heads, x.shape[1] // (3 * n_heads)) for x in (text, latent)]
    if gains:
        ones = torch.ones_like(gains[0][:1])
        normed = [torch.cat([F.normalize(x[:, :, :2], dim=-1), x[:, :, 2:]], 2) for x in parts]
        parts = [x * torch.cat([gain, ones]) for x, gain in zip(normed, gains, strict=True)]
    q, k, v = torch.cat(parts, 1).permute(2, 0, 3, 1, 4)
    shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    out = (shares @ v).transpose(1, 2).flatten(2)
    return out[:, :-1].flatten(0, 1), out[:, -1]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("strength", [1.0, 30.0])  # the latents' heads against the texts': one takes all, or nothing
@pytest.mark.parametrize(("n_heads", "size", "tokens"), [(2, 8, 10), (3, 12, 4), (1, 40, 7), (1, 8, 1)])
def test_attention_of_full_rows(
    monkeypatch: pytest.MonkeyPatch, n_heads: int, size: int, tokens: int, strength: float, normed: bool
) -> None:
    monkeypatch.setattr(attention, "TOKENS", 4)
    monkeypatch.setattr(attention, "TILES", 2)
    torch.manual_seed(0)
    rows = 2
    text, latent = (torch.randn(n, 3 * n_heads * size) for n in (rows * tokens, rows))
    gains = [3 * torch.rand(2, n_heads, size) for _ in range(2)]
    gains[1][:] *= strength
    latent = latent if normed else latent * strength
    leaves = [x.requires_grad_() for x in (text, latent, *gains)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    of_texts, of_latents = gains if normed else (None, None)
    found = attend_full(text, latent, of_texts, of_latents, n_heads, OnCPU)
    expected = by_softmax(exact[0], exact[1], exact[2:] if normed else None, n_heads)
    weights = [torch.randn_like(x) for x in found]
    ours = torch.autograd.grad(found, leaves, weights, allow_unused=not normed)
    theirs = torch.autograd.grad(expected, exact, [x.double() for x in weights], allow_unused=not normed)
    for x, y in [*zip(found, expected, strict=True), *zip(ours, theirs, strict=True)]:
        if y is not None:
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4 * float(y.detach().abs().max()) + 1e-6)


def test_attention_of_short_types() -> None:
    """Heads are rounded when attention takes them, forward and backward alike."""
    torch.manual_seed(0)
    text, latent = (torch.randn(n, 3 * 2 * 8).half() for n in (2 * 70, 2))
    leaves = [x.requires_grad_() for x in (text, latent, *(3 * torch.rand(2, 2, 2, 8)))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found = attend_full(leaves[0], leaves[1], leaves[2], leaves[3], 2, OnCPU)
    expected = by_softmax(exact[0], exact[1], exact[2:], 2)
    assert {x.dtype for x in found} == {torch.float16}
    weights = [torch.randn_like(x) for x in found]
    ours = torch.autograd.grad(found, leaves, weights)
    theirs = torch.autograd.grad(expected, exact, [x.double() for x in weights])
    for x, y in [*zip(found, expected, strict=True), *zip(ours, theirs, strict=True)]:
        assert (x - y).norm() <= 2e-3 * y.norm()


def test_a_model_attends_so_in_full_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every block but the last, with what operations give."""
    monkeypatch.setattr(sublayer, "_programs", lambda *_: 2)
    monkeypatch.setattr(fused_blocks, "cudnn_serves", lambda heads: heads.shape == (4, 5, 6, 8))
    monkeypatch.setattr(fused_blocks, "CuDNN", OnCPU)
    calls: list[int] = []

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return attend_full(*arguments)

    monkeypatch.setattr(fused_blocks, "attend_full", counted)
    model = formula_model(model_config(hidden_size=16, head_dim=8, cond_dim=16, n_blocks=3))
    assert isinstance(model, FastMMDiT)
    batch, times = formula_batch((5, 5), seq_len=5), torch.tensor([0.2, 0.8])
    decoder = Group(batch["input_ids"], batch["latent"], times, 0 * times, ("text",))
    encoder = Group(batch["input_ids"], batch["latent"], 0 * times, times, ("latent",))
    padding, found, parameters = Padding(batch["attention_mask"], False, [5] * 2), [], list(model.parameters())
    for serves in (False, True):
        monkeypatch.setattr("job.model.fast.kernels_serve", lambda _, serves=serves: serves)
        outputs = model._trunk(model._text_input([encoder, decoder], padding), [encoder, decoder], padding)
        total = torch.stack([output.sin().sum() for output in outputs]).sum()
        found.append([*outputs, *torch.autograd.grad(total, parameters, materialize_grads=True)])
    assert len(calls) == 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_cudnn_is_called_as_pytorch_declares_it() -> None:
    """Its operations are PyTorch's own, and another release may change them."""
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default._schema
    assert [x.name for x in forward.arguments][:5] == ["query", "key", "value", "attn_bias", "compute_log_sumexp"]
    given = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"]
    assert [x.name for x in forward.returns] == ["output", "logsumexp", *given, "debug_attn_mask"]
    of_attention = ["grad_out", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset"]
    of_rows = ["attn_bias", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale"]
    assert [x.name for x in backward.arguments] == [*of_attention, *of_rows]
