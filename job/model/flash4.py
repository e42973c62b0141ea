"""FlashAttention 4 (pip install flash-attn-4), where it is installed: attention for Hopper and Blackwell GPUs.

PyTorch brings the second one along, whose kernels for ragged rows use half of what these GPUs can do. PyTorch's own
switch to the fourth (torch.nn.attention.activate_flash_attention_impl) fits none of its later releases.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from job.errors import first_line
from job.model.attention import Attended

GENERATIONS = (9, 10)  # of GPUs: Hopper and Blackwell
# What its compiler says of the library's own code, to every user.
warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted", UserWarning)


class Flash4:
    """Of rows side by side, as `job.model.attention` wants it."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Attended:
        from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found]

        out, lse, *_ = _flash_attn_fwd(*(x.transpose(1, 2) for x in (q, k, v)), return_lse=True)
        return Attended(out.transpose(1, 2), lse, ())

    @staticmethod
    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended) -> tuple[Tensor, ...]:
        from flash_attn.cute.interface import _flash_attn_bwd

        given = (x.transpose(1, 2) for x in (q, k, v, attended.out, gradient))
        to_q, to_k, to_v = _flash_attn_bwd(*given, attended.lse)
        return to_q.transpose(1, 2), to_k.transpose(1, 2), to_v.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Attention within rows that lie end to end: queries [Q, h, d], keys and values [K, h, d]; returns [Q, h, d].

    The ends are [R + 1] int32 on the device, 0 and then each row's; `max_q` and `max_k` are the most that a row has.
    """
    from flash_attn.cute import flash_attn_varlen_func  # type: ignore[import-not-found]

    ends = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    out, _ = flash_attn_varlen_func(q, k, v, **ends)
    return out


def flash4_serves(x: Tensor) -> bool:
    """Whether it attends to heads [.., h, d] like these. Not where every bit must repeat, nor in compiled code."""
    if not x.is_cuda or torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling():
        return False
    return _works(x.device, x.dtype, x.shape[-1])


@cache
def _works(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether it is there and runs, both ways: tried, as its releases must fit those of other packages."""
    if dtype not in (torch.bfloat16, torch.float16) or size % 8 or not 8 <= size <= 128:
        return False
    if torch.cuda.get_device_capability(device)[0] not in GENERATIONS or not _is_installed():
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(3, 1, size, device=device, dtype=dtype, requires_grad=True)
            ends = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
            attend(x, x, x, ends, ends, 2, 2).sum().backward()
            rows = x.detach().transpose(0, 1)[None]
            Flash4.backward(rows, rows, rows, rows, Flash4.forward(rows, rows, rows))
            torch.cuda.synchronize(device)
    except Exception as error:  # what does not fit shows in many ways
        print(
            f"warning: flash-attn-4 is installed but does not run here ({first_line(error)}); steps take longer with "
            "PyTorch's attention: install the release that docs/how-to/train-a-large-model.md names, or remove it",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def _is_installed() -> bool:
    """Told without an import: its older namesake, flash-attn, takes seconds for one or fails."""
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True
