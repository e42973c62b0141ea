"""The blocks' work on a GPU recorded once and replayed: a CUDA graph for the forward pass, two for the backward pass.

A step of 24 blocks starts thousands of kernels, and the host takes longer to start them than the GPU to run them. A
graph starts them all at once. It replays what was recorded on the same memory, so shapes must be those of the
recording: ragged rows are filled up to one of a few sizes by one more row, whose tokens nothing reads (filling.py). Of
the two, one begins a step's sums of gradients and one adds to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from job.model.beside import branching
from job.model.conditioned import Stacked
from job.model.elementwise import add_to
from job.model.filling import any_lengths
from job.model.float8 import Weight
from job.model.groups import Group, Padding
from job.model.products import Products

WARM_UPS = 2  # runs before a recording, in which libraries choose their kernels and take their memory
Key = tuple[Any, ...]
# From texts [G * T, H], the groups (without tokens), their padding and stacked layers to what both heads give.
Body = Callable[[Tensor, Sequence[Group], Padding, Stacked | None], tuple[Tensor, Tensor]]


@dataclass
class Backward:
    """The graph of a backward pass, and where it leaves the gradients of inputs."""

    graph: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    to_inputs: list[Tensor | None] = field(default_factory=list)


@dataclass
class Recording:
    """Graphs and the memory that they read and write."""

    inputs: list[Tensor]
    outputs: tuple[Tensor, ...] = ()
    to_outputs: list[Tensor] = field(default_factory=list)
    used: list[int] = field(default_factory=list)  # numbers of the parameters that get a gradient
    forward: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    first: Backward = field(default_factory=Backward)  # begins the sums of parameters' gradients
    further: Backward = field(default_factory=Backward)  # adds to them


@dataclass
class Casts:
    """Linear layers' weights and biases in autocast's type, and the stacked ones as one.

    All are cast at once, where autocast would start a kernel for each. All recordings share them.
    """

    of_parameters: dict[int, Tensor]  # by the parameter's number
    stacked: Stacked | None
    numbers: dict[int, list[int]]  # of the parameters that lie in a tensor, by its id()
    in_float8: dict[int, Weight]  # by the parameter's number
    versions: list[int] = field(default_factory=list)  # of the parameters when they were cast


class _Body(nn.Module):
    """A model whose forward pass is `body`, for torch.func.functional_call."""

    def __init__(self, model: nn.Module, body: Body) -> None:
        super().__init__()
        self.model, self.body = model, body

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self.body(*arguments)


class Graphs:
    """Recordings of a model's `body` by shape. The gradients of its parameters are added up in memory that all share.

    `stacked` are layers of one input that `body` computes as one, `in_float8` weights whose products are computed in
    8-bit floats. Only one forward pass may wait for its backward pass:
    recordings share the rest of their memory too. A second one meanwhile is not for a graph.
    """

    def __init__(
        self, model: nn.Module, body: Body, stacked: Sequence[nn.Linear] = (), in_float8: Sequence[Tensor] = ()
    ) -> None:
        self.body = _Body(model, body)
        named = [(name, p) for name, p in self.body.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.sums: dict[int, Tensor] = {}  # by the parameter's number; parts of whole ones where layers are stacked
        self._whole_sums: dict[int, Tensor] = {}
        # Under DDP gradients must pass through autograd, whose hooks reduce them; else they go where autograd would put
        # them, a few kernels in place of one for each of a thousand parameters.
        self.through_autograd = dist.is_available() and dist.is_initialized()
        self.waiting = False
        self._unwritten: set[int] = set()  # sums, by their id(), that the pass under way has to begin
        number_of = {id(p): number for number, p in enumerate(self.parameters)}
        stacks = [
            [number_of.get(id(p), -1) for p in (getattr(layer, kind) for layer in stacked)]
            for kind in ("weight", "bias")
        ]
        self._stacks = [] if not stacked or any(-1 in stack for stack in stacks) else stacks
        self._in_float8 = [number_of[id(weight)] for weight in in_float8 if id(weight) in number_of]
        self._recordings: dict[Key, Recording] = {}
        self._casts: dict[torch.dtype, Casts] = {}
        self._places: list[int] = []
        self._pool: Any = None
        self._branch: Any = None

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
        self.cast_parameters(dtype)
        key = (dtype, padding.full, *(group.heads for group in groups), *((x.shape, x.requires_grad) for x in inputs))
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs, groups, padding, dtype)
        parameters = self.parameters if self.through_autograd else []
        return _Replay.apply(self, self._recordings[key], len(inputs), *inputs, *parameters)

    def adopt(self, recording: Recording) -> bool:
        """Let the parameters' gradients be the sums; returns whether there were none, and sums begin."""
        fresh = [number for number in recording.used if self.parameters[number].grad is None]
        for number in recording.used:
            parameter, total = self.parameters[number], self.sums[number]
            if parameter.grad is not None and parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total
        begins = len(fresh) == len(recording.used)
        if fresh and not begins:
            torch._foreach_zero_([self.sums[number] for number in fresh])
        return begins

    def begin(self) -> None:
        """Let the next backward pass begin all sums that it has something for."""
        self._unwritten = {id(total) for total in (*self.sums.values(), *self._whole_sums.values())}

    def begins(self, total: Tensor) -> bool:
        """Whether what comes next for a sum is its first part."""
        if id(total) not in self._unwritten:
            return False
        self._unwritten.remove(id(total))
        return True

    def _record(self, given: list[Tensor], groups: Sequence[Group], padding: Padding, dtype: torch.dtype) -> Recording:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._branch = self._branch or torch.cuda.Stream()
        recording = Recording([x.detach().clone().requires_grad_(x.requires_grad) for x in given])
        passes = Passes(self, recording.inputs, groups, padding, dtype)
        with _recording_mode():
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(WARM_UPS):
                    with branching(self._branch):
                        read = [x for x in passes.forward() if x.requires_grad]
                    # Zeros, since it adds to sums of gradients that may be under way.
                    to_outputs = [torch.zeros_like(x) for x in read]
                    with branching(self._branch):
                        passes.backward(read, to_outputs)
            torch.cuda.synchronize()
            recording.used = sorted(passes.used)
            del read, to_outputs
            with self._captured(recording.forward):
                recording.outputs = passes.forward()
            read = [x for x in recording.outputs if x.requires_grad]
            recording.to_outputs = [torch.zeros_like(x) for x in read]
            if not self.through_autograd:
                with self._captured(recording.further.graph):
                    recording.further.to_inputs = passes.backward(read, recording.to_outputs, once_more=True)
            self.begin()
            with self._captured(recording.first.graph):
                recording.first.to_inputs = passes.backward(read, recording.to_outputs)
            self._unwritten.clear()
        return recording

    @contextmanager
    def _captured(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"), branching(self._branch):
            yield

    def sum_of(self, numbers: list[int]) -> Tensor:
        """Memory for the gradient of a parameter, or for those of a whole stack, one below the other."""
        if numbers[0] not in self.sums:
            together = next((stack for stack in self._stacks if numbers[0] in stack), numbers)
            whole, parts = _one_below_the_other([self.parameters[number] for number in together], torch.float32)
            self._whole_sums[together[0]] = whole.zero_()
            self.sums.update(zip(together, parts, strict=True))
        return self.sums[numbers[0]] if len(numbers) == 1 else self._whole_sums[numbers[0]]

    def casts(self, dtype: torch.dtype) -> Casts:
        """Memory for the weights and biases of linear layers in autocast's type; none for float32."""
        if dtype not in self._casts:
            self._casts[dtype] = Casts({}, None, {}, {}) if dtype == torch.float32 else self._make_casts(dtype)
        return self._casts[dtype]

    def _make_casts(self, dtype: torch.dtype) -> Casts:
        layers = [module for module in self.body.modules() if isinstance(module, nn.Linear)]
        linear = {id(p) for layer in layers for p in layer.parameters()}
        in_stacks = {number for stack in self._stacks for number in stack}
        alone = [[n] for n, p in enumerate(self.parameters) if id(p) in linear and n not in in_stacks]
        of_parameters: dict[int, Tensor] = {}
        wholes = []
        for numbers in [*self._stacks, *alone]:
            whole, parts = _one_below_the_other([self.parameters[number] for number in numbers], dtype)
            of_parameters.update(zip(numbers, (part.requires_grad_() for part in parts), strict=True))
            wholes.append(whole.requires_grad_() if len(numbers) > 1 else of_parameters[numbers[0]])
        numbers_of = {id(whole): numbers for whole, numbers in zip(wholes, [*self._stacks, *alone], strict=True)}
        in_float8 = {number: Weight(of_parameters[number]) for number in self._in_float8}
        return Casts(of_parameters, (wholes[0], wholes[1]) if self._stacks else None, numbers_of, in_float8)

    def cast_parameters(self, dtype: torch.dtype) -> Casts:
        """The casts for a type, up to date."""
        casts = self.casts(dtype)
        versions = [self.parameters[number]._version for number in casts.of_parameters]
        # Fused optimizers leave versions as they are. But whoever steps lets go of the gradients that he stepped by.
        has_stepped = all(self.parameters[number].grad is None for number in casts.of_parameters)
        if casts.of_parameters and (has_stepped or versions != casts.versions):
            casts.versions = versions
            sources = [self.parameters[number].detach() for number in casts.of_parameters]
            torch._foreach_copy_([x.detach() for x in casts.of_parameters.values()], sources)
            for number, weight in casts.in_float8.items():
                weight.copy_(casts.of_parameters[number])
        return casts


def _one_below_the_other(parameters: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Uninitialized memory for the parameters' first dimensions end to end, and the part of each."""
    like = parameters[0].detach()
    if len(parameters) == 1:
        whole = torch.empty_like(like, dtype=dtype)
        return whole, [whole]
    whole = like.new_empty(sum(len(p) for p in parameters), *like.shape[1:], dtype=dtype)
    return whole, [part.detach() for part in whole.split([len(p) for p in parameters])]


class Passes:
    """The forward and the backward pass that a recording is made of, on memory that stays."""

    def __init__(
        self, graphs: Graphs, inputs: list[Tensor], groups: Sequence[Group], padding: Padding, dtype: torch.dtype
    ) -> None:
        self.graphs, self.inputs, self.casts = graphs, inputs, graphs.casts(dtype)
        self.used: set[int] = set()  # numbers of the parameters that got a gradient
        parts = [inputs[place : place + 3] for place in range(2, len(inputs), 3)]
        self.groups = [
            replace(group, latents=latents, text_t=text_t, latent_t=latent_t)
            for group, (latents, text_t, latent_t) in zip(groups, parts, strict=True)
        ]
        self.lengths = any_lengths(sum(padding.lengths), len(padding.lengths), padding.mask.shape[1])
        self.weights = [self.casts.of_parameters.get(number, p) for number, p in enumerate(graphs.parameters)]

    def forward(self) -> tuple[Tensor, ...]:
        """What the body gives for the inputs."""
        arguments = (self.inputs[0], self.groups, Padding(self.inputs[1], False, self.lengths), self.casts.stacked)
        in_float8 = {id(self.casts.of_parameters[number]): weight for number, weight in self.casts.in_float8.items()}
        with Products(self.casts.numbers, self._sum_of_cast, in_float8, self.graphs.begins):
            weights = dict(zip(self.graphs.names, self.weights, strict=True))
            return functional_call(self.graphs.body, weights, arguments)

    def backward(self, outputs: list[Tensor], to_outputs: list[Tensor], once_more: bool = False) -> list[Tensor | None]:
        """The inputs' gradients; those of the parameters are added to their sums. `once_more` keeps what it reads."""
        leaves = [x for x in self.inputs if x.requires_grad]
        # No gradient comes for a weight whose layer adds it to the sum, but only what leads to a leaf is gone through.
        wanted = [*leaves, *self.weights, *(self.casts.stacked or ())]
        with torch.autocast(outputs[0].device.type, enabled=False):
            gradients = torch.autograd.grad(outputs, wanted, to_outputs, once_more, allow_unused=True)
        of_parameters = gradients[len(leaves) : len(leaves) + len(self.weights)]
        left = {number: gradient for number, gradient in enumerate(of_parameters) if gradient is not None}
        sums = {number: self.graphs.sum_of([number]) for number in left}
        begun = {number for number, total in sums.items() if self.graphs.begins(total)}
        if begun:
            torch._foreach_copy_([sums[number] for number in begun], [left[number] for number in begun])
        further = left.keys() - begun
        add_to([sums[number] for number in further], [left[number] for number in further])
        self.used.update(left)
        of_inputs = iter(gradients)
        return [next(of_inputs) if x.requires_grad else None for x in self.inputs]

    def _sum_of_cast(self, cast: Tensor) -> Tensor:
        numbers = self.casts.numbers[id(cast)]
        self.used.update(numbers)
        return self.graphs.sum_of(numbers)


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
        begins = graphs.through_autograd or graphs.adopt(recording)
        backward = recording.first if begins else recording.further
        backward.graph.replay()
        graphs.waiting = False
        to_parameters: list[Tensor | None] = []
        if graphs.through_autograd:
            # Autograd copies what others hold on to, so that the next replay may overwrite it.
            used = set(recording.used)
            to_parameters = [graphs.sums[n] if n in used else None for n in range(len(graphs.parameters))]
        to_inputs = [None if x is None else x.clone() for x in backward.to_inputs]
        return None, None, None, *to_inputs, *to_parameters
