"""One rank's share of a state as a safetensors file, written from a staged copy; reading tensors back from all shares.

Plain tensors, the same on every rank, go whole to one rank each; of a DTensor every rank writes its shard. A shard's
place in the whole tensor stands in the file's metadata, so a state is read back on any number of ranks.

Why not torch.distributed.checkpoint: its metadata is a pickle, which runs code when it is read, and it hashes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
# Bytes hashed and written at a time. Both release the interpreter lock, so the training thread goes on.
CHUNK = 16 << 20
# Bytes between two fdatasync. Without it the page cache takes everything at once, and one fsync at the end shows no
# progress for minutes: the watchdog could not tell a slow disk from a dead one.
SYNC = 256 << 20


@dataclass(frozen=True)
class Piece:
    """What this process holds of a tensor of `shape`: `local`, which starts at `offset`."""

    local: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: bool  # every rank holds all of it


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a nested state dict under dotted names. Raises TypeError for a leaf that is no tensor."""
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        else:
            raise TypeError(f"{prefix}{key} is no tensor but {type(value).__name__}; numbers belong into the record")


def _in_shards(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor.

    Who has one has loaded their module. It takes a second, for which no `--help` and no refusal should wait.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def piece(tensor: torch.Tensor) -> Piece:
    """This process's piece of a tensor or DTensor."""
    if not _in_shards(tensor):
        return Piece(tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape), whole=True)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Piece(tensor.to_local().detach(), tuple(offset), tuple(tensor.shape), whole=False)


def _first_replica(tensor: torch.Tensor) -> bool:
    """Whether this process is the one that writes a shard of which others hold copies.

    It is the one whose coordinate is 0 along every mesh dimension over which the tensor is replicated.
    """
    if not _in_shards(tensor):
        return True
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    along = zip(coordinate, tensor.placements, strict=True)
    return all(position == 0 for position, placement in along if placement.is_replicate())


def share(tensors: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Piece]:
    """What `rank` writes: its shards, and of the tensors that all ranks hold about 1/world_size of the bytes.

    Every rank computes the same division, without talking: the largest tensor first, each to the rank that has the
    fewest bytes so far.
    """
    flat = dict(flatten(tensors))
    pieces = {name: piece(tensor) for name, tensor in flat.items()}
    mine = {name: p for name, p in pieces.items() if not p.whole and p.local.numel() and _first_replica(flat[name])}
    held_by_all = [name for name, p in pieces.items() if p.whole]
    load = [0] * world_size
    for name in sorted(held_by_all, key=lambda name: (-pieces[name].local.nbytes, name)):
        writer = load.index(min(load))
        load[writer] += pieces[name].local.nbytes
        if writer == rank:
            mine[name] = pieces[name]
    return mine


class Stage:
    """A copy of a share in host memory, laid out as the data part of its file.

    The optimizer changes the tensors while the file is being written, so the file is written from a copy. Its memory is
    used again for every save: allocating pinned memory, or touching new pages, takes longer than the copy itself.
    """

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        # Widest types first: every tensor is then aligned, and the format allows no holes.
        order = sorted(pieces, key=lambda name: (-pieces[name].local.element_size(), name))
        self.layout = self.describe(pieces)
        parts = {name: [p.offset, p.shape] for name, p in pieces.items() if not p.whole}
        header: dict[str, Any] = {"__metadata__": {"parts": json.dumps(parts)}}
        size = 0
        for name in order:
            local = pieces[name].local
            offsets = [size, size + local.nbytes]
            header[name] = {"dtype": DTYPES[local.dtype], "shape": list(local.shape), "data_offsets": offsets}
            size += local.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
        self.header = len(text).to_bytes(8, "little") + text
        pinned = any(p.local.is_cuda for p in pieces.values())
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.buffer.zero_()  # touch every page now: the first save would pay for it otherwise
        self.views = {}
        for name in order:
            start, stop = header[name]["data_offsets"]
            local = pieces[name].local
            self.views[name] = self.buffer[start:stop].view(local.dtype).view(local.shape)
        self._copied = torch.cuda.Event() if pinned else None

    @staticmethod
    def describe(pieces: Mapping[str, Piece]) -> Any:
        """What must be equal for a stage to be used again."""
        return {name: (p.local.dtype, p.local.shape, p.offset, p.shape, p.local.is_cuda) for name, p in pieces.items()}

    def copy(self, pieces: Mapping[str, Piece]) -> None:
        """Copy the tensors in.

        From a GPU the copies are only queued, on the stream of the training: whatever changes the tensors next runs
        after them, and the host does not wait. `write` waits for the event behind them, in its own thread.
        """
        for name, p in pieces.items():
            self.views[name].copy_(p.local, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def write(self, path: Path, progress: Callable[[int], None]) -> tuple[int, str]:
        """Write the file and flush it to disk; returns its size in bytes and its SHA-256. Raises OSError.

        The hash is of the memory, not of what the disk gives back: it says what was meant to be written. `progress` is
        told the bytes written so far.
        """
        if self._copied is not None:
            self._copied.synchronize()
        digest, written, synced = hashlib.sha256(self.header), len(self.header), 0
        with path.open("wb", buffering=0) as file:
            _write_all(file, memoryview(self.header))
            data = self.buffer.numpy().data
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                digest.update(chunk)
                _write_all(file, chunk)
                written += len(chunk)
                progress(written)
                if written - synced >= SYNC:
                    os.fdatasync(file.fileno())
                    synced = written
            os.fsync(file.fileno())
        return written, digest.hexdigest()


def _write_all(file: Any, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]  # a raw write may be short, just before the disk is full


def sha256(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ends(start: Sequence[int], shape: Sequence[int]) -> list[int]:
    """End of a box along each dimension."""
    return [first + size for first, size in zip(start, shape, strict=True)]


def _within(low: Sequence[int], high: Sequence[int], start: Sequence[int]) -> tuple[slice, ...]:
    """Index of the box from low to high in a tensor whose first element lies at start."""
    return tuple(slice(lo - first, hi - first) for lo, hi, first in zip(low, high, start, strict=True))


class Reader:
    """All tensors of a state in the shares that hold them, read from the disk only where they are asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._parts: dict[str, list[tuple[Any, tuple[int, ...]]]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            parts = json.loads((file.metadata() or {}).get("parts", "{}"))
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                shape = tuple(file.get_slice(name).get_shape())
                offset, shape = parts.get(name, ((0,) * len(shape), shape))
                self._parts[name].append((file, tuple(offset)))
                self.shapes[name], self.dtypes[name] = tuple(shape), file.get_slice(name).get_dtype()

    def read(self, name: str, into: torch.Tensor, offset: tuple[int, ...]) -> None:
        """Copy the part of tensor `name` that starts at `offset` into a tensor, bit for bit.

        A stored part and the wanted one are boxes in the whole tensor: what they share is copied, from every file that
        has some of it. Raises ValueError when the files together do not have all of it.
        """
        copied = 0
        for file, start in self._parts[name]:
            stored = file.get_slice(name)
            stored_end = _ends(start, stored.get_shape())
            low = [max(a, b) for a, b in zip(start, offset, strict=True)]
            high = [min(a, b) for a, b in zip(stored_end, _ends(offset, into.shape), strict=True)]
            if any(h <= lo for lo, h in zip(low, high, strict=True)):
                continue
            source, target = _within(low, high, start), into[_within(low, high, offset)]
            target.copy_(stored[source] if source else file.get_tensor(name))  # a tensor of no dimension has no slice
            copied += target.numel()
        if copied != into.numel():
            raise ValueError(f"{name}: {copied} of {into.numel()} elements stored")

    def tensor(self, name: str) -> torch.Tensor:
        """Whole tensor `name` on the CPU."""
        dtype = {text: dtype for dtype, text in DTYPES.items()}[self.dtypes[name]]
        whole = torch.empty(self.shapes[name], dtype=dtype)
        self.read(name, whole, (0,) * whole.dim())
        return whole
