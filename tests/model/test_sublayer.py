"""The kernels for GPUs compute what streams.py and Spans compute, and compile for the GPUs that they are meant for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hyper_connections.mHCv2 import ManifoldConstrainedHyperConnections
from hypothesis import given
from hypothesis import strategies as st
from objective_cases import formula_batch, formula_model, model_config
from torch import Tensor

from job.model import elementwise, heads, sublayer
from job.model.conditioned import conditioned_layers
from job.model.end_to_end import EndToEnd
from job.model.fast import FastMMDiT
from job.model.filling import any_lengths
from job.model.graphs import Graphs, Passes
from job.model.groups import Group, Padding
from job.model.packed import Spans
from job.model.streams import Mixing, read, write

pytestmark = [
    pytest.mark.kernels,
    # Chosen before Triton is first imported, the interpreter runs its kernels on a CPU.
    pytest.mark.skipif(
        find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
        reason="not by Triton's interpreter: make test-kernels",
    ),
]
EPS = 1e-5


class Case:
    """Random streams of spans with conditions of their own, what the last branch gave, and how the next one reads."""

    def __init__(self, counts: list[int], width: int) -> None:
        torch.manual_seed(0)
        self.spans = Spans(counts, torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))
        rows, conditions = sum(counts), len(counts)
        self.connection = ManifoldConstrainedHyperConnections(2, dim=width)
        for parameter in self.connection.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
        self.streams = torch.randn(rows, 2, width, requires_grad=True)
        self.branch = torch.randn(rows, width, requires_grad=True)
        self.bias = torch.randn(width, requires_grad=True)
        self.gains = torch.randn(conditions, width, requires_grad=True)
        self.modulation = torch.randn(conditions, 2 * width, requires_grad=True)
        self.mixing = torch.rand(rows, 3, requires_grad=True)

    def leaves(self) -> list[Tensor]:
        return [
            self.streams,
            self.branch,
            self.bias,
            self.gains,
            self.modulation,
            self.mixing,
            *self.connection.parameters(),
        ]

    def by_operations(self, writes: bool, reads: bool) -> list[Tensor]:
        streams = self.streams
        if writes:
            keep = self.mixing[:, 0]
            mix = torch.stack([keep, 1 - keep, 1 - keep, keep], dim=-1).view(-1, 2, 2)
            mixing = Mixing(mix, self.mixing[:, 1:, None])
            streams = write(streams, mixing, self.spans.scale(self.branch + self.bias, self.gains))
        if not reads:
            return [streams]
        x, next_mixing = read(self.connection, streams)
        assert next_mixing is not None
        gain, bias = self.modulation.chunk(2, dim=-1)
        normed = self.spans.norm(x, gain, bias, EPS)
        return [streams, normed, torch.cat([next_mixing.mix[:, 0, :1], next_mixing.post[..., 0]], dim=-1)]

    def by_kernels(self, writes: bool, reads: bool) -> list[Tensor]:
        ((weight, bias),) = sublayer.connection_weights([self.connection])
        branch = sublayer.Branch(self.branch, self.gains, self.mixing, self.bias)
        segments = sublayer.cut(self.spans.index, len(self.spans.counts), self.streams.shape[-1])
        reading = sublayer.Reading(weight, bias, self.modulation, EPS)
        if not reads:
            return [sublayer.write_streams(self.streams, segments, branch)]
        if not writes:
            return list(sublayer.read_streams(self.streams, segments, reading))
        return list(sublayer.write_and_read(self.streams, segments, branch, reading))


def assert_same(found: list[Tensor], expected: list[Tensor], leaves: list[Tensor]) -> None:
    """Outputs, and the gradients of a sum over them with random weights."""
    weights = [torch.randn_like(x) for x in expected]
    gradients = []
    for outputs in (found, expected):
        total = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(torch.as_tensor(total), leaves, allow_unused=True))
    for ours, theirs in [*zip(found, expected, strict=True), *zip(*gradients, strict=True)]:
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("writes", "reads"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(("counts", "width"), [([3, 4], 8), ([1, 1, 0, 2, 1, 3, 0], 12), ([1, 1, 1, 1], 8)])
def test_a_sublayer(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], width: int, writes: bool, reads: bool, rows: int
) -> None:
    """Widths that are no power of two; conditions that begin within a chunk, of one row, and without rows."""
    monkeypatch.setattr(sublayer, "ROWS", rows)
    monkeypatch.setattr(sublayer, "SUMMED_SEGMENTS", 2)
    monkeypatch.setattr(sublayer, "_programs", lambda *_: 6)  # chunks of two or three rows
    case = Case(counts, width)
    assert_same(case.by_kernels(writes, reads), case.by_operations(writes, reads), case.leaves())


def test_a_sublayer_without_rows() -> None:
    """streams.py is for none; gradients are zeros of every leaf's shape."""
    case = Case([0, 0], 8)
    outputs = case.by_kernels(writes=True, reads=True)
    leaves = case.leaves()
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], materialize_grads=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(leaf), rtol=0, atol=0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 9))
def test_segments_are_all_rows_of_one_condition_each(counts: list[int], programs: int) -> None:
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sublayer, "_programs", lambda *_: programs)
        segments = sublayer.cut(index, len(counts), 8)
    bounds, firsts = segments.bounds.tolist(), segments.firsts.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(index))
    assert bounds == sorted(bounds)
    chunks = max(-(-programs // 2), programs - len(counts))
    assert len(bounds) - 1 <= chunks + len(counts)
    assert max(end - start for start, end in pairwise(bounds)) <= -(-len(index) // chunks)
    for condition, (first, after) in enumerate(pairwise(firsts)):
        rows = [row for segment in range(first, after) for row in range(bounds[segment], bounds[segment + 1])]
        assert rows == (index == condition).nonzero().flatten().tolist()


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("n_heads", "size"), [(2, 8), (3, 12)])
def test_joined_heads(monkeypatch: pytest.MonkeyPatch, n_heads: int, size: int, normed: bool) -> None:
    monkeypatch.setattr(heads, "HEAD_ROWS", 4)
    torch.manual_seed(0)
    places = torch.randperm(10)
    at = EndToEnd(text_at=places[:7], latent_at=places[7:])
    given = [torch.randn(rows, 3 * n_heads * size, requires_grad=True) for rows in (7, 3)]
    gains = [torch.rand(2, n_heads, size, requires_grad=True) for _ in given]
    expected = []
    for part in range(3):
        values = [x.view(-1, 3, n_heads, size)[:, part] for x in given]
        if normed and part < 2:
            values = [F.normalize(x, dim=-1) * gain[part] for x, gain in zip(values, gains, strict=True)]
        expected.append(at.join(values[0], values[1]))
    text_gains, latent_gains = gains if normed else (None, None)
    found = heads.join_heads(given[0], given[1], text_gains, latent_gains, at, n_heads)
    assert_same(list(found), expected, [*given, *gains])


@pytest.mark.parametrize("counts", [(7, 20), (1, 9)])
def test_biased_gelu(monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int]) -> None:
    """Rows and columns that are no multiple of a tile's, in more programs than one."""
    monkeypatch.setattr(elementwise, "COLUMNS", 16)
    monkeypatch.setattr(elementwise, "_programs", lambda _: 4)
    torch.manual_seed(0)
    x, bias = 3 * torch.randn(*counts, requires_grad=True), torch.randn(counts[1], requires_grad=True)
    assert_same([elementwise.biased_gelu(x, bias)], [F.gelu(x + bias)], [x, bias])


def test_biased_gelu_of_short_types_is_as_exact_as_they_are() -> None:
    """Computed by a shorter formula. float16, since Triton's interpreter cuts bf16 off where a GPU rounds."""
    x = torch.linspace(-12, 12, 4001).half()[None].requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, expected = elementwise.biased_gelu(x, torch.zeros(4001, dtype=x.dtype)), F.gelu(exact)
    slopes = [torch.autograd.grad(y.sum(), given)[0] for y, given in ((found, x), (expected, exact))]
    for ours, theirs in ((found, expected), slopes):
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-11, atol=1e-6)


def test_gradients_of_any_type_are_added() -> None:
    totals = [torch.randn(3, 1500), torch.randn(7), torch.randn(2, 2)]
    parts = [torch.randn(3, 1500).bfloat16(), torch.randn(7).bfloat16(), torch.randn(2, 2)]
    expected = [total + part for total, part in zip(totals, parts, strict=True)]
    elementwise.add_to(totals, parts)
    assert all(torch.equal(total, right) for total, right in zip(totals, expected, strict=True))


def test_a_model_by_kernels_reads_no_lengths_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives what operations give, also when told other lengths of the same sum, as a recorded graph is."""
    monkeypatch.setattr(heads, "HEAD_ROWS", 8)
    monkeypatch.setattr(sublayer, "_programs", lambda *_: 2)
    model = formula_model(model_config(hidden_size=16, head_dim=8, cond_dim=16, n_blocks=3))
    assert isinstance(model, FastMMDiT)
    batch, times = formula_batch((5, 2, 2), seq_len=5), torch.tensor([0.2, 0.5, 0.8])
    decoder = Group(batch["input_ids"], batch["latent"], times, 0 * times, ("text",))
    encoder = Group(batch["input_ids"], batch["latent"], 0 * times, times, ("latent",))
    found, parameters = [], list(model.parameters())
    for serves, lengths in ((False, [5, 2, 2]), (True, [5, 2, 2]), (True, any_lengths(9, 3, 5))):
        monkeypatch.setattr("job.model.fast.kernels_serve", lambda _, serves=serves: serves)
        padding = Padding(batch["attention_mask"], False, lengths)
        outputs = model._trunk(model._text_input([encoder, decoder], padding), [encoder, decoder], padding)
        total = torch.stack([output.sin().sum() for output in outputs]).sum()
        found.append([*outputs, *torch.autograd.grad(total, parameters, materialize_grads=True)])
    assert any_lengths(9, 3, 5) != [5, 2, 2]
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_the_passes_of_a_recording_add_up_what_autograd_gives(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    """Over two batches, with the weights cast once, and for inputs as for parameters."""
    torch.manual_seed(0)
    monkeypatch.setattr(heads, "HEAD_ROWS", 8)
    monkeypatch.setattr(sublayer, "_programs", lambda *_: 2)
    monkeypatch.setattr("job.model.fast.kernels_serve", lambda _: True)
    model = formula_model(model_config(hidden_size=16, head_dim=8, cond_dim=16, n_blocks=2))
    assert isinstance(model, FastMMDiT)
    parameters = list(model.parameters())
    graphs = Graphs(model, model._trunk, conditioned_layers(model.mmdit.blocks))  # type: ignore[arg-type]
    expected = [torch.zeros_like(p) for p in parameters]
    for lengths in ((5, 3, 1), (2, 5)):
        batch, times = formula_batch(lengths, seq_len=5), torch.linspace(0.2, 0.8, len(lengths))
        padding = Padding(batch["attention_mask"], False, list(lengths))
        groups = [
            Group(batch["input_ids"], batch["latent"], times, 0 * times, ("text",)),
            Group(batch["input_ids"], batch["latent"], 0 * times, times, ("latent",)),
        ]
        text = model._text_input(groups, padding).detach().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs = model._trunk(text, groups, padding)
        weights = [torch.randn_like(x) for x in outputs]
        to_text, *gradients = torch.autograd.grad(outputs, [text, *parameters], weights, materialize_grads=True)
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient
        inputs = [text, padding.mask]
        for group in groups:
            inputs += [group.latents, group.text_t, group.latent_t]
        graphs.cast_parameters(dtype)
        passes = Passes(graphs, inputs, groups, padding, dtype)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = list(passes.forward())
        to_inputs = passes.backward(found, weights)
        assert to_inputs[0] is not None
        for ours, theirs in [*zip(found, outputs, strict=True), (to_inputs[0], to_text)]:
            assert (ours.float() - theirs).norm() <= tolerance * theirs.norm()
        for number, parameter in enumerate(graphs.parameters):
            parameter.grad = graphs.sums.get(number)
    assert (graphs.casts(dtype).stacked is None) == (dtype == torch.float32)
    # By kind of parameter: some gradients are small differences of large ones, and mostly what bf16 rounded.
    differences: dict[str, list[Tensor]] = {}
    for theirs, (name, parameter) in zip(expected, model.named_parameters(), strict=True):
        ours = torch.zeros_like(theirs) if parameter.grad is None else parameter.grad
        kind = re.sub(r"\d+", "", name)
        differences.setdefault(kind, []).append(torch.stack([(ours - theirs).norm(), theirs.norm()]))
    for kind, norms in differences.items():
        difference, norm = torch.stack(norms).norm(dim=0)
        assert difference <= tolerance * norm + 1e-6, kind


def test_where_kernels_cannot_run_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nA traceback of pages")

    monkeypatch.setattr(torch, "zeros", without_compiler)
    assert not sublayer.kernels_serve.__wrapped__(torch.device("cuda"))
    said = capsys.readouterr().err
    assert said.startswith(
        "warning: the kernels of the residual streams cannot be built here (Failed to find C compiler.)"
    )
    assert len(said.splitlines()) == 1


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from job.model import attention_kernels, cross_entropy_kernels, elementwise_kernels, float8_kernels, head_kernels
from job.model import sublayer_kernels
import sys

SUBLAYER = {"H": 1024, "COLUMNS": 1024, "ROWS": 1, "WRITE": True, "READ": True}
BACK = {**SUBLAYER, "STAGES": 3}
SUMS = {"H": 1024, "COLUMNS": 16, "SEGMENTS": 128, "WRITE": True, "READ": True}
HEADS = {"D": 64, "COLUMNS": 64, "ROWS": 32, "NORM": True}
TOKENS = {"D": 64, "COLUMNS": 64, "TOKENS": 64, "NORM": True}
LATENTS = {"D": 64, "COLUMNS": 64, "TILES": 32, "NORM": True}
GELU = {"H": 4096, "COLUMNS": 512, "ROWS": 4}
FLOATS = {"K": 4096, "COLUMNS": 4096, "LARGEST": 448.0, "SMALLEST": 1e-30}
WORDS = {"W": 30528, "COLUMNS": 2048, "ROWS": 2, "GRADIENTS": True}
BF16 = {"branch", "branch_bias", "gains", "modulation", "x", "to_x", "to_branch", "to_modulation", "to_gains"}
BF16 |= {"latent", "latent_out", "to_latent_out", "to_latent"}
BF16 |= {"qkv", "q", "k", "v", "to_q", "to_k", "to_v", "to_qkv", "out", "to_out", "part", "logits"}
TYPES = {"eps": "fp32", "scale": "fp32", "index": "*i64", "place": "*i64", "targets": "*i64", "picked": "*i64"}
TYPES["values"] = "*fp8e4nv"
TYPES |= dict.fromkeys(["bounds", "first_segments"], "*i32")
TYPES |= dict.fromkeys(["conditions", "n_segments", "n_tokens", "tiles"], "i32")
TYPES |= dict.fromkeys(["lse_of_row", "lse_of_head", "lse_of_token"], "i32")
TYPES |= dict.fromkeys(["gains_stride", "modulation_stride", "stride", "n_rows", "chunk", "n_heads", "count"], "i32")
for kernel, sizes in (
    (sublayer_kernels.sublayer_forward, SUBLAYER),
    (sublayer_kernels.sublayer_backward, BACK),
    (sublayer_kernels.sum_parts, SUMS),
    (head_kernels.heads_forward, HEADS),
    (attention_kernels.tokens_forward, TOKENS),
    (attention_kernels.merge_forward, {"D": 64, "COLUMNS": 64, "TOKENS": 64}),
    (attention_kernels.latent_forward, LATENTS),
    (attention_kernels.queries_backward, TOKENS),
    (attention_kernels.keys_backward, TOKENS),
    (attention_kernels.latent_backward, LATENTS),
    (head_kernels.heads_backward, HEADS),
    (elementwise_kernels.biased_gelu_forward, GELU),
    (elementwise_kernels.biased_gelu_backward, GELU),
    (elementwise_kernels.add_kernel, {"BLOCK": 4096}),
    (cross_entropy_kernels.cross_entropy_rows, WORDS),
    # Older GPUs than of compute capability 8.9 have no such floats.
    *([(float8_kernels.quantize_rows, FLOATS)] if int(sys.argv[1]) >= 89 else []),
):
    types = {name: TYPES.get(name, "*bf16" if name in BF16 else "*fp32") for name in kernel.arg_names}
    types |= dict.fromkeys(sizes, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
    source = ASTSource(fn=kernel, signature={name: types[name] for name in kernel.arg_names}, constexprs=values)
    built = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 8})
    print(kernel.__name__, len(built.asm["cubin"]))
"""


@pytest.mark.parametrize(("capability", "kernels"), [("80", 15), ("90", 16)])
def test_the_kernels_compile_for_gpus(capability: str, kernels: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == kernels
