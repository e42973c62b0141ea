"""Arrays out of small files of numpy, .npz and .npy, many thousands a second.

numpy's own reader takes half a millisecond for a file of a few hundred bytes, most of it in Python: it opens and seeks
for each array, and compiles each header as Python source. That is longer than a disk takes. Here a file is read once,
and a header that was seen before is not looked at again. All that is not as `numpy.savez` and `numpy.save` write it is
left to numpy, which also says what is wrong with a file.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

END_OF_ARCHIVE = b"PK\x05\x06"  # of an archive without a comment, so many bytes before its end
END_BYTES = 22
MEMBER = b"PK\x03\x04"
MEMBER_HEADER = struct.Struct("<4s5H3L2H")  # signature, ..., names and extra fields follow it
DATA_DESCRIPTOR = 0x08  # flag: the sizes stand behind the data
ENCRYPTED = 0x01
SIZES_IN_EXTRA = 0xFFFFFFFF
ZIP64 = struct.Struct("<2H2Q")  # kind and length of the extra field, the member's sizes: plain and as it is stored
NPY_PREFIX = 10  # bytes of a version 1 file before its header, whose length is the last two


class Unusual(Exception):
    """A file that is left to numpy."""


def read_npy(path: str) -> np.ndarray:
    """The array of a file. What numpy raises for one that is none."""
    content = _content(path)
    try:
        return _array(content)
    except Unusual:
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
        return array


def read_npz(path: str, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an archive, by name. What numpy and zipfile raise for one that is none, KeyError for one not there."""
    content = _content(path)
    try:
        members = _members(content)
        return [_array(members[f"{name}.npy"]) for name in names]
    except (Unusual, KeyError):
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return [arrays[name] for name in names]


def _content(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # a buffer would only be filled and emptied
        return file.read()


def _members(content: bytes) -> dict[str, bytes]:
    """The files within an archive."""
    end = len(content) - END_BYTES
    if content[end : end + 4] != END_OF_ARCHIVE:
        raise Unusual
    count, start_of_list = struct.unpack_from("<H4xL", content, end + 10)
    members: dict[str, bytes] = {}
    at = 0
    while at != start_of_list:
        try:
            name, stored, at = _member(content, at)
        except (struct.error, UnicodeDecodeError, zlib.error) as error:
            raise Unusual from error
        members[name] = stored
    if len(members) != count:
        raise Unusual
    return members


def _member(content: bytes, at: int) -> tuple[str, bytes, int]:
    """Name and content of the file within an archive that begins here, and where the next one does."""
    signature, _, flags, method, _, _, checksum, stored_size, size, name_size, extra_size = MEMBER_HEADER.unpack_from(
        content, at
    )
    at += MEMBER_HEADER.size
    name = content[at : at + name_size].decode("ascii")
    at += name_size
    if size == SIZES_IN_EXTRA == stored_size:
        kind, length, size, stored_size = ZIP64.unpack_from(content, at)
        if (kind, length) != (1, 16):
            raise Unusual
    at += extra_size
    if signature != MEMBER or flags & (DATA_DESCRIPTOR | ENCRYPTED):
        raise Unusual
    data = content[at : at + stored_size]
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS, size)
    elif method != zipfile.ZIP_STORED:
        raise Unusual
    if len(data) != size or zlib.crc32(data) != checksum:
        raise Unusual
    return name, data, at + stored_size


def _array(content: bytes) -> np.ndarray:
    """The array of a .npy file, read-only."""
    if content[:8] != b"\x93NUMPY\x01\x00":
        raise Unusual
    start = NPY_PREFIX + int.from_bytes(content[8:NPY_PREFIX], "little")
    shape, dtype = _described(content[:start])
    count = 1
    for length in shape:
        count *= length
    if len(content) - start != count * dtype.itemsize:
        raise Unusual
    return np.frombuffer(content, dtype, count, start).reshape(shape)


@lru_cache(1024)
def _described(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type that a header tells of."""
    file = io.BytesIO(header[8:])
    try:
        shape, is_column_major, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, TypeError, SyntaxError) as error:
        raise Unusual from error
    if dtype.hasobject or not dtype.itemsize or (is_column_major and len(shape) > 1):
        raise Unusual
    return shape, dtype
