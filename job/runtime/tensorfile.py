"""One rank's share of a state as a safetensors file, written from a staged copy; and reading any tensor back from all shares.

Plain tensors, the same on every rank, go whole to one rank each; of a DTensor every rank writes its shard. A shard's place
in the whole tensor stands in the file's metadata, so a state is read back on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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
CHUNK = (
    16 << 20
)  # bytes hashed and written at a time; both release the interpreter lock, so the training thread goes on
SYNC = 256 << 20  # bytes between two fdatasync, so that a slow disk shows progress and the last fsync is short


@dataclass(frozen=True)
class Piece:
    """What this process holds of a tensor of `shape`: `local`, which starts at `offset`."""

    local: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: bool  # every rank holds all of it


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a nested state dict under dotted names. Raises TypeError for a leaf that is none."""
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        else:
            raise TypeError(f"{prefix}{key} is no tensor but {type(value).__name__}; numbers belong into the record")


def piece(tensor: torch.Tensor) -> Piece:
    """This process's piece of a tensor or DTensor."""
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape), whole=True)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Piece(tensor.to_local().detach(), tuple(offset), tuple(tensor.shape), whole=False)


def _first_replica(tensor: torch.Tensor) -> bool:
    """Whether no other process holds the same shard with a smaller coordinate."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    return all(
        c == 0 for c, placement in zip(coordinate, tensor.placements, strict=True) if isinstance(placement, Replicate)
    )


def share(tensors: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Piece]:
    """What `rank` writes: its shards, and of the tensors that all ranks hold about 1/world_size of the bytes."""
    flat = dict(flatten(tensors))
    pieces = {name: piece(tensor) for name, tensor in flat.items()}
    load = [0] * world_size
    mine = {name: p for name, p in pieces.items() if not p.whole and p.local.numel() and _first_replica(flat[name])}
    for name, p in sorted(
        ((n, p) for n, p in pieces.items() if p.whole), key=lambda item: (-item[1].local.nbytes, item[0])
    ):
        writer = load.index(min(load))
        load[writer] += p.local.nbytes
        if writer == rank:
            mine[name] = p
    return mine


class Stage:
    """A copy of a share in host memory, laid out as the data part of its file and used again for every save."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        # Widest types first: every tensor is then aligned, and the format allows no holes.
        order = sorted(pieces, key=lambda name: (-pieces[name].local.element_size(), name))
        self.layout = self.describe(pieces)
        header: dict[str, Any] = {
            "__metadata__": {"parts": json.dumps({n: [p.offset, p.shape] for n, p in pieces.items() if not p.whole})}
        }
        end, places = 0, {}
        for name in order:
            local = pieces[name].local
            places[name] = (end, end + local.nbytes)
            header[name] = {
                "dtype": DTYPES[local.dtype],
                "shape": list(local.shape),
                "data_offsets": [end, end + local.nbytes],
            }
            end += local.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        pinned = any(p.local.is_cuda for p in pieces.values())
        self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        self.buffer.zero_()  # touch every page now: the first save would pay for it otherwise
        self.views = {
            n: self.buffer[a:b].view(pieces[n].local.dtype).view(pieces[n].local.shape) for n, (a, b) in places.items()
        }
        self._copied = torch.cuda.Event() if pinned else None

    @staticmethod
    def describe(pieces: Mapping[str, Piece]) -> Any:
        """What must be equal for a stage to be used again."""
        return {name: (p.local.dtype, p.local.shape, p.offset, p.shape, p.local.is_cuda) for name, p in pieces.items()}

    def copy(self, pieces: Mapping[str, Piece]) -> None:
        """Copy in. From a GPU it is only queued, before whatever changes the tensors next on this stream; no host synchronization."""
        for name, p in pieces.items():
            self.views[name].copy_(p.local, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def write(self, path: Path, progress: Callable[[int], None]) -> tuple[int, str]:
        """Write, flush to disk, and return bytes and SHA-256 of what was meant to be written. Raises OSError."""
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


class Reader:
    """All tensors of a state in the shares that hold them."""

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
        """Copy the part of tensor `name` that starts at `offset` into a tensor, bit for bit. Raises ValueError when parts of it are missing."""
        copied = 0
        for file, start in self._parts[name]:
            stored = file.get_slice(name)
            low = [max(a, b) for a, b in zip(start, offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, stored.get_shape(), offset, into.shape, strict=True)]
            if any(h <= lo for lo, h in zip(low, high, strict=True)):
                continue
            source = tuple(slice(lo - a, h - a) for lo, h, a in zip(low, high, start, strict=True))
            target = into[tuple(slice(lo - b, h - b) for lo, h, b in zip(low, high, offset, strict=True))]
            target.copy_(stored[source] if source else file.get_tensor(name))
            copied += target.numel()
        if copied != into.numel():
            raise ValueError(f"{name}: {copied} of {into.numel()} elements stored")

    def tensor(self, name: str) -> torch.Tensor:
        """Whole tensor `name` on the CPU."""
        dtype = {text: dtype for dtype, text in DTYPES.items()}[self.dtypes[name]]
        whole = torch.empty(self.shapes[name], dtype=dtype)
        self.read(name, whole, (0,) * whole.dim())
        return whole
