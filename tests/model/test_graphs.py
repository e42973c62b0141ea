"""What recorded graphs ask of batches, weights and sums of gradients, as far as it needs no GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import formula_batch, formula_model, model_config
from torch.func import functional_call

from job.model.conditioned import conditioned_layers
from job.model.fast import FastMMDiT
from job.model.filling import SIZES, any_lengths, filled
from job.model.graphs import Graphs, Passes
from job.model.groups import Group, Padding


@pytest.mark.parametrize("lengths", [(10, 6, 3), (1,), (10, 10, 9)])
def test_rows_of_a_filled_batch_come_out_as_they_would(lengths: tuple[int, ...]) -> None:
    model = formula_model(model_config()).train()
    assert isinstance(model, FastMMDiT)
    batch, rows = formula_batch(lengths), len(lengths)
    padding = Padding(batch["attention_mask"], False, list(lengths))
    a_time, each_time = torch.tensor([1.0]), torch.linspace(0.2, 0.8, rows)
    encoder = Group(batch["input_ids"], batch["latent"], 0 * a_time, each_time, ("latent",))
    decoder = Group(batch["input_ids"].clamp(max=3), batch["latent"], a_time, 0 * a_time, ("text",))
    expected = model.encode([encoder, decoder], padding)
    groups, more = filled([encoder, decoder], padding)
    text, latent = model._trunk(model._text_input(groups, more), groups, more)
    torch.testing.assert_close(text[: sum(lengths)], expected.text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latent[:rows], expected.latent, rtol=1e-4, atol=1e-5)


def test_weights_cast_beforehand_give_what_autocast_gives() -> None:
    model = formula_model(model_config()).train()
    assert isinstance(model, FastMMDiT)
    batch, time = formula_batch((10, 6, 3)), torch.tensor([0.5])
    padding = Padding(batch["attention_mask"], False, [10, 6, 3])
    groups = [Group(batch["input_ids"], batch["latent"], time, time, ("text", "latent"))]
    arguments = (model._text_input(groups, padding).detach(), groups, padding)
    graphs = Graphs(model, model._trunk)
    cast = graphs.cast_parameters(torch.bfloat16).of_parameters
    weights = [cast.get(number, p) for number, p in enumerate(graphs.parameters)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model._trunk(*arguments)
        found = functional_call(graphs.body, dict(zip(graphs.names, weights, strict=True)), arguments)
    assert cast
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    gradients = [
        torch.autograd.grad([x.float().sum() for x in outputs], leaves, allow_unused=True)
        for outputs, leaves in ((found, weights), (expected, graphs.parameters))
    ]
    for name, ours, theirs in zip(graphs.names, *gradients, strict=True):
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours.float(), theirs), name


def test_weights_are_cast_anew_after_a_step() -> None:
    """Fused optimizers do not count their changes, so a step is told by the gradients that are gone after it."""
    model = formula_model(model_config())
    graphs = Graphs(model, model._trunk)  # type: ignore[arg-type]
    weight = model.mmdit.blocks[0].joint_attn.to_qkv[0].weight  # type: ignore[union-attr, index]
    (number,) = (number for number, parameter in enumerate(graphs.parameters) if parameter is weight)

    def is_up_to_date() -> bool:
        cast = graphs.cast_parameters(torch.bfloat16).of_parameters[number]
        return torch.equal(cast, graphs.parameters[number].bfloat16())

    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    assert is_up_to_date()
    weight.grad = torch.ones_like(weight)
    version = weight._version
    optimizer.step()
    assert weight._version == version
    assert not is_up_to_date()
    optimizer.zero_grad()
    assert is_up_to_date()
    weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        weight.add_(1.0)
    assert is_up_to_date()


BY_KERNELS = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
        reason="not by Triton's interpreter: make test-kernels",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BY_KERNELS)])
def test_a_backward_pass_begins_sums_or_adds_to_them(dtype: torch.dtype) -> None:
    model = formula_model(model_config()).train()
    assert isinstance(model, FastMMDiT)
    batch, time = formula_batch((10, 6, 3)), torch.tensor([0.5])
    groups, padding = (
        [Group(batch["input_ids"], batch["latent"], time, time, ("text", "latent"))],
        Padding(batch["attention_mask"], False, [10, 6, 3]),
    )
    text, (group,) = model._text_input(groups, padding).detach(), groups
    graphs = Graphs(model, model._trunk, conditioned_layers(model.mmdit.blocks))  # type: ignore[arg-type]
    inputs = [text, padding.mask, group.latents, group.text_t, group.latent_t]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        graphs.cast_parameters(dtype)
        passes = Passes(graphs, inputs, groups, padding, dtype)
        read = list(passes.forward())
    to_outputs = [torch.randn_like(x) for x in read]
    found = []
    for begins in (False, True, False):
        if begins:
            for total in graphs.sums.values():
                total.fill_(torch.nan)
            graphs.begin()
        passes.backward(read, to_outputs, once_more=True)
        found.append({number: graphs.sums[number].clone() for number in passes.used})
    once, begun, twice = found
    assert once
    for number, total in once.items():
        assert torch.equal(begun[number], total), graphs.names[number]
        torch.testing.assert_close(twice[number], 2 * total)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(2, 300), st.data())
def test_filled_batches_have_few_sizes(rows: int, seq_len: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, seq_len), min_size=rows, max_size=rows))
    mask = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
    padding = Padding(mask, False, lengths)
    if padding.full:
        assert filled([], padding)[1] is padding
        return
    _, more = filled([], padding)
    tokens = sum(more.lengths)
    assert int(more.mask.sum()) == tokens
    assert more.lengths[:-1] == lengths
    assert tokens - sum(lengths) <= max(1, rows * seq_len // SIZES)
    stand_ins = any_lengths(tokens, rows + 1, seq_len)
    assert sum(stand_ins) == tokens
    assert len(stand_ins) == rows + 1
    assert max(stand_ins) >= max(lengths)
    assert min(stand_ins) >= 1
