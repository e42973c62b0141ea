"""A whole sublayer's work on two residual streams in one pass over memory, by Triton kernels on a GPU.

Between two matrix products of a block lie: the branch's output times its gain, its addition to the streams, which are
mixed meanwhile (streams.py), the mixture that the next branch reads, its norm and its modulation. One by one these pass
over the streams some twenty times a sublayer, and over a GPU's memory each time; one kernel reads and writes them
once forward, and another reads them and their gradient and writes one backward.

streams.py with Spans.norm and Spans.scale are what this must equal, and what runs wherever this does not.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from job.errors import first_line

ROWS = 1  # of a tile
# Columns of a warp: the fewer warps share a row, the fewer instructions exchange its sums. Backward the sums over rows,
# which stay in registers, need more warps.
FORWARD_COLUMNS, BACKWARD_COLUMNS = 1024, 256
STAGES = 3  # rows that are under way at a time, backward, where shared memory holds them
WARPS_PER_PROCESSOR = 8  # of the backward kernel: with the sums that it keeps in registers no more fit
SUMMED_COLUMNS, SUMMED_SEGMENTS = 16, 128  # of a tile
MAX_WIDTH = 2048  # columns: a row must fit the registers of one program
STREAMS = 2


class Branch(NamedTuple):
    """What a branch gave, and how it is written to the streams."""

    output: Tensor  # [N, H]
    gains: Tensor  # [C, H] by condition
    mixing: Tensor  # [N, 3] float32, which came with the branch's input
    bias: Tensor | None = None  # [H]: to be added to the output


class Reading(NamedTuple):
    """How the next branch's input is read from the streams."""

    weight: Tensor  # [4, H] float32: columns of alpha, two mixing logits and post
    bias: Tensor  # [2, 4] float32
    modulation: Tensor  # [C, 2H] by condition: the norm's gain, then its bias
    eps: float


class Segments(NamedTuple):
    """Rows cut into segments whose rows share one condition, each for a program, without asking the device anything."""

    conditions: Tensor  # [N] int64: of each row; it never falls
    bounds: Tensor  # [segments + 1] int32: where they begin, and N; some may be empty
    firsts: Tensor  # [C + 1] int32: the first segment of each condition, and their number


def cut(index: Tensor, conditions: int, width: int) -> Segments:
    """Rows [N, .., width] of conditions `index` [N], of so many, cut into about as many as a GPU computes at once.

    Chunks of one length, cut once more where a condition begins. So there are fewer chunks where there are more
    conditions: what the GPU does not hold begins when something else ends, and all would wait for it. But conditions
    may be more than it holds.
    """
    n_rows, held = len(index), _programs(width, index.device)
    programs = min(n_rows, max(ceil_div(held, 2), held - conditions))
    chunk = ceil_div(n_rows, max(1, programs))
    starts = torch.searchsorted(index, torch.arange(conditions + 1, device=index.device))
    chunks = torch.arange(0, n_rows, max(1, chunk), device=index.device)
    bounds = torch.cat([chunks, starts]).sort().values
    return Segments(index, bounds.int(), torch.searchsorted(bounds, starts).int())


@cache
def kernels_serve(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU with Triton, which builds their launchers with a C compiler.

    Where they do not, a warning says why, once: the same is then computed by several times as many kernels.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        streams = torch.zeros(1, 2, 16, dtype=torch.float32, device=device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        reading = Reading(streams.new_zeros(4, 16), streams.new_zeros(2, 4), streams.new_zeros(1, 32), 1e-5)
        read_streams(streams, cut(index, 1, 16), reading)
    except Exception as error:  # what is missing shows in many ways: a compiler, Python's headers, a driver too old
        print(
            f"warning: the kernels of the residual streams cannot be built here ({first_line(error)}); steps take "
            "longer without them: install gcc and python3-dev",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def connection_weights(connections: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """`Reading.weight` and `Reading.bias` of hyper-connections with two streams and one width.

    The norm's gain and the learned scales go into the weights. All connections at once: one by one they would start
    four times as many small kernels.
    """
    with torch.autocast(connections[0].static_alpha.device.type, enabled=False):
        scales = torch.cat(
            [x.reshape(1) for c in connections for x in (c.pre_branch_scale, c.residual_scale, c.h_post_scale)]
        ).view(-1, 3)
        scales = torch.cat([scales[:, :2], scales[:, 1:]], dim=-1)  # there are two mixing logits
        gain = (_stack([c.norm.gamma for c in connections]) + 1) * connections[0].norm.scale
        of_alpha = _stack([c.dynamic_alpha_fn.squeeze(0) for c in connections])
        of_post = _stack([c.dynamic_beta_fn for c in connections])
        columns = torch.cat([of_alpha, of_post], dim=-1).mT
        weights = (columns * scales[..., None]).contiguous() * gain[:, None]
        alpha = _stack([c.static_alpha for c in connections])
        post = _stack([c.static_beta.squeeze(1) for c in connections])
        biases = torch.cat([alpha, post], dim=-1)
    return list(zip(weights.float().unbind(), biases.float().unbind(), strict=True))


def _stack(tensors: list[Tensor]) -> Tensor:
    """The tensors in one, whose gradient comes in one piece: hundreds of small ones are then added by one kernel."""
    stacked = torch.stack(tensors)
    if stacked.requires_grad:
        stacked.register_hook(Tensor.contiguous)
    return stacked


def read_streams(streams: Tensor, segments: Segments, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """The streams [N, 2, H] float32 as they are, a branch's input [N, H] of autocast's type, and its mixing [N, 3].

    The streams must be used as they come back: their gradient passes through here.
    """
    return _apply(streams, segments, None, reading)


def write_and_read(
    streams: Tensor, segments: Segments, branch: Branch, reading: Reading
) -> tuple[Tensor, Tensor, Tensor]:
    """The streams after `branch` was written, the next branch's input, and its mixing; shapes as in `read_streams`."""
    return _apply(streams, segments, branch, reading)


def write_streams(streams: Tensor, segments: Segments, branch: Branch) -> Tensor:
    """The streams after `branch` was written; shapes as in `read_streams`."""
    return _apply(streams, segments, branch, None)[0]


def _apply(streams: Tensor, segments: Segments, branch: Branch | None, reading: Reading | None) -> Any:
    device = streams.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    output = gains = mixing = branch_bias = weight = bias = modulation = None
    eps = 0.0
    if branch:
        output, gains, mixing, branch_bias = branch
        output, mixing = output.contiguous(), mixing.contiguous()
    if reading:
        weight, bias, modulation, eps = reading
    given = (streams.contiguous(), output, branch_bias, gains, mixing, weight, bias, modulation)
    with torch.autocast(device, enabled=False):
        return _Sublayer.apply(*given, segments, eps, dtype)


class _Sublayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        output: Tensor | None,
        branch_bias: Tensor | None,
        gains: Tensor | None,
        mixing: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        modulation: Tensor | None,
        segments: Segments,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        from job.model.sublayer_kernels import sublayer_forward

        n_rows, _, width = streams.shape
        writes, reads = output is not None, weight is not None
        written = torch.empty_like(streams) if writes else streams
        x = next_mixing = stats = None
        if reads:
            x = streams.new_empty(n_rows, width, dtype=dtype)
            next_mixing, stats = streams.new_empty(n_rows, 3), streams.new_empty(n_rows, 12)
        given = (streams, output, branch_bias, gains, mixing, weight, bias, modulation)
        if n_rows:
            sublayer_forward[(ceil_div(n_rows, ROWS),)](
                *(streams, output, branch_bias, gains, _stride(gains), mixing, segments.conditions),
                *(weight, bias, modulation, _stride(modulation), written, x, next_mixing, stats, n_rows, eps),
                **_shape(width, FORWARD_COLUMNS),
                WRITE=writes,
                READ=reads,
            )
        ctx.save_for_backward(*given, next_mixing, stats, *segments)
        ctx.set_materialize_grads(False)
        return written, x, next_mixing

    @staticmethod
    def backward(
        ctx: Any, to_written: Tensor | None, to_x: Tensor | None, to_next_mixing: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from job.model.sublayer_kernels import sublayer_backward, sum_parts

        *given, next_mixing, stats, of_rows, bounds, firsts = ctx.saved_tensors
        streams, output, branch_bias, gains, mixing, weight, bias, modulation = given
        n_rows, _, width = streams.shape
        writes, reads = output is not None, weight is not None
        conditions, programs = len(firsts) - 1, len(bounds) - 1
        to_written = torch.zeros_like(streams) if to_written is None else to_written.contiguous()
        to_streams = torch.empty_like(streams)
        to_output, to_branch_bias, to_gains, to_mixing, to_weight, to_bias, to_modulation = (
            None if x is None else x.new_empty(x.shape)
            for x in (output, branch_bias, gains, mixing, weight, bias, modulation)
        )
        if reads:
            to_x = torch.zeros_like(streams[:, 0]) if to_x is None else to_x.contiguous()
            to_next_mixing = streams.new_zeros(n_rows, 3) if to_next_mixing is None else to_next_mixing.contiguous()
        parts, logit_parts = streams.new_empty(programs, 7, width), streams.new_empty(programs, 8)
        ways = {"WRITE": writes, "READ": reads}
        sublayer_backward[(programs,)](
            *(to_written, to_x, to_next_mixing, streams, output, branch_bias, gains, _stride(gains), mixing),
            *(of_rows, bounds, weight, modulation, _stride(modulation), next_mixing, stats),
            *(to_streams, to_output, to_mixing, parts, logit_parts),
            **_shape(width, BACKWARD_COLUMNS),
            STAGES=_stages(width, streams.device),
            **ways,
        )
        shared = 4 if reads else 1  # rows of the parts that all conditions share
        sum_parts[(conditions + shared, ceil_div(width, SUMMED_COLUMNS))](
            *(parts, logit_parts, firsts, conditions, programs),
            *(to_modulation, to_gains, to_branch_bias, to_weight, to_bias),
            H=width,
            COLUMNS=SUMMED_COLUMNS,
            SEGMENTS=SUMMED_SEGMENTS,
            **ways,
            num_warps=4,
        )
        of_branch = (to_output, to_branch_bias, to_gains, to_mixing)
        return to_streams, *of_branch, to_weight, to_bias, to_modulation, None, None, None


def _stride(table: Tensor | None) -> int:
    """Elements from one row of a table to the next."""
    return 0 if table is None else table.stride(0)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _shape(width: int, of_warp: int) -> dict[str, int]:
    """Sizes of a tile of whole rows, and the warps that share it, each with about `of_warp` columns."""
    columns = 1 << (width - 1).bit_length()
    return {"H": width, "COLUMNS": columns, "ROWS": ROWS, "num_warps": min(16, max(1, columns // of_warp))}


@cache
def _programs(width: int, device: torch.device) -> int:
    """Segments of rows of a width; for another device than a GPU, where Triton's interpreter runs, one processor's."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * max(1, WARPS_PER_PROCESSOR // _shape(width, BACKWARD_COLUMNS)["num_warps"])


@cache
def _stages(width: int, device: torch.device) -> int:
    """Rows of a width under way at a time: one in registers, others in shared memory, four of streams and two of x."""
    if device.type != "cuda":
        return 1
    from job.model.sublayer_kernels import shared_memory

    of_row = 7 * 4 * _shape(width, BACKWARD_COLUMNS)["COLUMNS"]  # one more for what else is kept there
    return 1 + min(STAGES - 1, shared_memory(device.index or 0) // of_row)
