"""The blocks' work on a GPU recorded once and replayed: a CUDA graph for the forward pass, one for the backward pass.

A step of 24 blocks starts thousands of kernels, and the host takes longer to start them than the GPU to run them. A
graph starts them all at once. It replays what was recorded on the same memory, so shapes must be those of the
recording: ragged rows are filled up to one of a few sizes by one more row, whose tokens nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from job.model.elementwise import add_to
from job.model.groups import Group, Padding

SIZES = 32  # sizes of ragged batches: a batch is filled up to the next 1/32 of what full rows have
WARM_UPS = 2  # runs before a recording, in which libraries choose their kernels and take their memory
Key = tuple[Any, ...]
# From texts [G * T, H], the groups (without tokens) and their padding to what both heads give.
Body = Callable[[Tensor, Sequence[Group], Padding], tuple[Tensor, Tensor]]


@dataclass
class Recording:
    """Two graphs and the memory that they read and write."""

    inputs: list[Tensor]
    outputs: tuple[Tensor, ...] = ()
    to_outputs: list[Tensor] = field(default_factory=list)
    to_inputs: list[Tensor | None] = field(default_factory=list)
    used: list[int] = field(default_factory=list)  # numbers of the parameters that get a gradient
    forward: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    backward: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)


class _Body(nn.Module):
    """A model whose forward pass is `body`, for torch.func.functional_call."""

    def __init__(self, model: nn.Module, body: Body) -> None:
        super().__init__()
        self.model, self.body = model, body

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self.body(*arguments)


class Graphs:
    """Recordings of a model's `body` by shape. The gradients of its parameters are added up in memory that all share.

    Only one forward pass may wait for its backward pass: recordings share the rest of their memory too. A second one
    meanwhile is not for a graph.
    """

    def __init__(self, model: nn.Module, body: Body) -> None:
        self.body = _Body(model, body)
        named = [(name, p) for name, p in self.body.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.sums: dict[int, Tensor] = {}
        # Under DDP gradients must pass through autograd, whose hooks reduce them; else they go where autograd would put
        # them, a few kernels in place of one for each of a thousand parameters.
        self.through_autograd = dist.is_available() and dist.is_initialized()
        self.waiting = False
        self._recordings: dict[Key, Recording] = {}
        self._casts: dict[torch.dtype, dict[int, Tensor]] = {}
        self._places: list[int] = []
        self._pool: Any = None

    def run(self, text: Tensor, groups: Sequence[Group], padding: Padding) -> tuple[Tensor, Tensor]:
        """What `body` gives, with gradients; the first time for a shape it is recorded."""
        places = [p.data_ptr() for p in self.parameters]
        if places != self._places:  # weights lie elsewhere than the recordings think
            self._recordings.clear()
            self._places = places
        inputs = [text, padding.mask]
        for group in groups:
            inputs += [group.latents, group.text_t, group.latent_t]
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
        key = (dtype, padding.full, *(group.heads for group in groups), *((x.shape, x.requires_grad) for x in inputs))
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs, groups, padding, dtype)
        parameters = self.parameters if self.through_autograd else []
        return _Replay.apply(self, self._recordings[key], len(inputs), *inputs, *parameters)

    def adopt(self, recording: Recording) -> None:
        """Let the parameters' gradients be the sums that a replay adds to."""
        fresh = []
        for number in recording.used:
            parameter, total = self.parameters[number], self.sums[number]
            if parameter.grad is total:
                continue
            if parameter.grad is None:
                fresh.append(total)
            else:
                total.copy_(parameter.grad)
            parameter.grad = total
        if fresh:
            torch._foreach_zero_(fresh)

    def _record(self, given: list[Tensor], groups: Sequence[Group], padding: Padding, dtype: torch.dtype) -> Recording:
        recording = Recording([x.detach().clone().requires_grad_(x.requires_grad) for x in given])
        inputs = recording.inputs
        lengths = any_lengths(sum(padding.lengths), len(padding.lengths), padding.mask.shape[1])
        parts = [inputs[place : place + 3] for place in range(2, len(inputs), 3)]
        recorded = [
            replace(group, latents=latents, text_t=text_t, latent_t=latent_t)
            for group, (latents, text_t, latent_t) in zip(groups, parts, strict=True)
        ]
        cast = self.cast_parameters(dtype)
        weights = [cast.get(number, p) for number, p in enumerate(self.parameters)]
        wanted = [*(x for x in inputs if x.requires_grad), *weights]

        def forward() -> tuple[Tensor, ...]:
            if cast:
                sources = [self.parameters[number].detach() for number in cast]
                torch._foreach_copy_([x.detach() for x in cast.values()], sources)
            arguments = (inputs[0], recorded, Padding(inputs[1], False, lengths))
            return functional_call(self.body, dict(zip(self.names, weights, strict=True)), arguments)

        with _recording_mode():
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(WARM_UPS):
                    read = [x for x in forward() if x.requires_grad]
                    gradients = _gradients(read, [torch.zeros_like(x) for x in read], wanted)
            torch.cuda.synchronize()
            of_parameters = gradients[len(wanted) - len(weights) :]
            recording.used = [number for number, gradient in enumerate(of_parameters) if gradient is not None]
            for number in recording.used:
                if number not in self.sums:
                    self.sums[number] = torch.zeros_like(self.parameters[number])
            del read, gradients, of_parameters
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(recording.forward, self._pool, capture_error_mode="thread_local"):
                recording.outputs = forward()
            read = [x for x in recording.outputs if x.requires_grad]
            recording.to_outputs = [torch.zeros_like(x) for x in read]
            with torch.cuda.graph(recording.backward, self._pool, capture_error_mode="thread_local"):
                gradients = _gradients(read, recording.to_outputs, wanted)
                sums = [self.sums[number] for number in recording.used]
                if self.through_autograd:
                    torch._foreach_zero_(sums)
                of_parameters = gradients[len(wanted) - len(weights) :]
                add_to(sums, [of_parameters[number] for number in recording.used])
            of_inputs = iter(gradients)
            recording.to_inputs = [next(of_inputs) if x.requires_grad else None for x in inputs]
        return recording

    def cast_parameters(self, dtype: torch.dtype) -> dict[int, Tensor]:
        """Memory for the weights and biases of linear layers in autocast's type, by the parameter's number.

        All are cast at once, and their gradients are added up without being cast first; autocast would start a kernel
        for each of both. All recordings share it: each casts anew, and weights do not change between its two passes.
        """
        if dtype != torch.float32 and dtype not in self._casts:
            layers = [module for module in self.body.modules() if isinstance(module, nn.Linear)]
            linear = {id(p) for layer in layers for p in layer.parameters()}
            self._casts[dtype] = {
                number: torch.empty_like(p, dtype=dtype).requires_grad_()
                for number, p in enumerate(self.parameters)
                if id(p) in linear
            }
        return self._casts.get(dtype, {})


@contextmanager
def _recording_mode() -> Iterator[None]:
    """Without autocast's cache: a cached weight would be computed in one graph and read in another."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.cuda.synchronize()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _gradients(outputs: list[Tensor], to_outputs: list[Tensor], wanted: list[Tensor]) -> tuple[Any, ...]:
    with torch.autocast("cuda", enabled=False):
        return torch.autograd.grad(outputs, wanted, to_outputs, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: Graphs, recording: Recording, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        for to, given in zip(recording.inputs, tensors[:count], strict=True):
            to.detach().copy_(given)
        recording.forward.replay()
        graphs.waiting = True
        ctx.graphs, ctx.recording = graphs, recording
        return tuple(x.detach().clone() for x in recording.outputs)

    @staticmethod
    def backward(ctx: Any, *to_outputs: Tensor) -> tuple[Tensor | None, ...]:
        graphs, recording = ctx.graphs, ctx.recording
        read = [to for to, x in zip(to_outputs, recording.outputs, strict=True) if x.requires_grad]
        for to, given in zip(recording.to_outputs, read, strict=True):
            to.copy_(given)
        if not graphs.through_autograd:
            graphs.adopt(recording)
        recording.backward.replay()
        graphs.waiting = False
        to_parameters: list[Tensor | None] = []
        if graphs.through_autograd:
            # Autograd copies what others hold on to, so that the next replay may overwrite it.
            used = set(recording.used)
            to_parameters = [graphs.sums[n] if n in used else None for n in range(len(graphs.parameters))]
        to_inputs = [None if x is None else x.clone() for x in recording.to_inputs]
        return None, None, None, *to_inputs, *to_parameters


def filled(groups: Sequence[Group], padding: Padding) -> tuple[list[Group], Padding]:
    """The same rows, and where they are ragged one more, which fills the batch up to one of SIZES sizes."""
    if padding.full:
        return list(groups), padding
    rows, seq_len = padding.mask.shape
    tokens = sum(padding.lengths)
    step = min(seq_len, max(1, rows * seq_len // SIZES))
    missing = -(-(tokens + 1) // step) * step - tokens  # at least one, at most `step`, which is no longer than a row
    mask = F.pad(padding.mask, (0, 0, 0, 1))
    mask[-1, :missing] = True
    more = [
        replace(
            group,
            tokens=F.pad(group.tokens, (0, 0, 0, 1)),
            latents=F.pad(group.latents, (0, 0, 0, 1)),
            text_t=_with_one_more(group.text_t, rows),
            latent_t=_with_one_more(group.latent_t, rows),
        )
        for group in groups
    ]
    return more, Padding(mask, False, [*padding.lengths, missing])


def _with_one_more(t: Tensor, rows: int) -> Tensor:
    return torch.cat([t, t[:1]]) if len(t) == rows and rows > 1 else t


def any_lengths(tokens: int, rows: int, seq_len: int) -> list[int]:
    """Lengths of so many tokens in all, the longest as long as any row's can be.

    The host's lengths of a recording: only their sum and their maximum are used, the rest is read from the mask.
    """
    lengths = []
    for left in range(rows - 1, -1, -1):
        length = min(seq_len, tokens - left)
        lengths.append(length)
        tokens -= length
    return lengths
