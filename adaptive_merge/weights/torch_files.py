"""The three containers of `torch.save` and `pickle.dump`, memory-mapped, with every size checked before use.

Zip (torch ≥ 1.6, TorchScript archives): `data.pkl` plus one stored record per storage. Legacy: five pickles, then
the numbers. Plain pickle: storages are nested legacy files. Only tensors that are asked for are read, and of them
only the descriptions under `headers_only`.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.limits import DIMENSIONS, DIRECTORY_BYTES, PICKLE_BYTES, LimitError
from adaptive_merge.weights.headers import without_numbers
from adaptive_merge.weights.pickles import StorageRecord, TensorRecord, read_pickle_stream

__all__ = ["TorchFile", "open_torch_file"]

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_SHARED: Final = 4  # times the size of a file that its tensors may have together: some share their numbers
_TAIL: Final = (1 << 16) + 256  # bytes at the end of a zip that may hold its last records and a comment
_LOCAL_HEADER: Final = 30  # bytes before the name in a zip member's local header

Kind = Literal["zip", "TorchScript", "legacy", "pickle"]


@dataclass(frozen=True)
class TorchFile:
    """A file of `torch.save` or `pickle.dump`: its object (inert) and, on request, its tensors.

    Args:
        root: what was saved, as stubs and records.
        places: storage key → (first byte, bytes) in `buffer`.
        sums: storage key → CRC-32 of its bytes, where the container has one.
    """

    path: Path
    kind: Kind
    root: Any
    buffer: mmap.mmap = field(repr=False)
    places: dict[str, tuple[int, int]] = field(repr=False)
    sums: dict[str, int] = field(default_factory=dict, repr=False)
    _given: list[int] = field(default_factory=lambda: [0], repr=False)  # bytes of all tensors that were asked for

    def tensor(self, record: TensorRecord, name: str) -> Tensor:
        """The tensor that `record` describes, contiguous; it may share the (private) mapping of the file.

        Raises:
            InputError: it asks for more numbers than the file holds.
        """
        flat = self._numbers(record.storage, name)
        if record.dtype is not None and record.dtype != flat.dtype:
            flat = _as_dtype(flat, record.dtype, f"`{self.path}`: tensor `{name}`")
        count = math.prod(record.size)
        reach = record.offset + sum((n - 1) * step for n, step in zip(record.size, record.stride)) + 1
        if len(record.size) > DIMENSIONS or count > flat.numel() or (count and reach > flat.numel()):
            raise InputError(
                f"`{self.path}`: tensor `{name}` of size {_brief(record.size)} needs {max(count, reach):.3g} numbers, "
                f"its storage holds {flat.numel()}; refused before allocation, get the file from its source again"
            )
        self._given[0] += count * flat.dtype.itemsize
        if self._given[0] > _SHARED * len(self.buffer):
            raise LimitError(
                f"`{self.path}`: refused, its tensors have more than {_SHARED} times the numbers of the file: the same "
                "ones again and again; get the file from its source again"
            )
        return flat.as_strided(record.size, record.stride, record.offset).contiguous()

    def _numbers(self, storage: StorageRecord, name: str) -> Tensor:
        if storage.nested is not None:
            numbers = _nested_numbers(storage.nested, f"`{self.path}`: storage of `{name}`")
            return numbers.to("meta") if without_numbers() else numbers
        start, size = self.places.get(storage.key or "", (0, -1))
        if size != storage.numel * storage.dtype.itemsize:
            stored = "no such record" if size < 0 else f"{size} bytes"
            raise InputError(
                f"`{self.path}`: storage of `{name}` should have {storage.numel:.3g} numbers of {storage.dtype}, "
                f"found {stored}; refused before allocation, get the file from its source again"
            )
        if without_numbers():
            return torch.empty(storage.numel, dtype=storage.dtype, device="meta")
        if (expected := self.sums.pop(storage.key or "", None)) is not None:  # once, before it is first used
            _check_sum(self.path, f"storage of `{name}`", self.buffer, (start, size), expected)
        return _from_bytes(self.buffer, storage.dtype, storage.numel, start)


def open_torch_file(path: Path) -> TorchFile:
    """Read the structure of a `.pt`, `.pth`, `.bin` or `.pkl` file without running or allocating what it names."""
    with path.open("rb") as file:
        try:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise InputError(f"`{path}`: the file is empty; copy or download it again") from error
    if buffer[:4] == b"PK\x03\x04":
        return _open_zip(path, buffer)
    return _open_legacy(path, buffer)


def _open_zip(path: Path, buffer: mmap.mmap) -> TorchFile:
    if _directory_bytes(buffer) > DIRECTORY_BYTES:
        raise LimitError(f"`{path}`: refused, a zip whose list of records has more than {DIRECTORY_BYTES:,} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"`{path}`: damaged zip ({error}); copy or download it again") from error
    names = [member.filename for member in members]
    twice = len(set(names)) < len(names)
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if twice or len(pickles) != 1:
        raise InputError(
            f"`{path}`: a zip with {len(pickles)} `data.pkl` records{' and names given twice' if twice else ''}, "
            "expected one; it was not written by torch.save (give a .pt or .safetensors file or a model folder)"
        )
    if sum(member.compress_size for member in members) > len(buffer):
        raise LimitError(f"`{path}`: refused, a zip whose records overlap; get the file from its source again")
    prefix = pickles[0].removesuffix("data.pkl")
    read = (f"{prefix}data.pkl", f"{prefix}byteorder", f"{prefix}data/")
    places = {
        member.filename.removeprefix(prefix): _member_place(path, buffer, member)
        for member in members
        if member.filename.startswith(read)
    }
    if "byteorder" in places and _bytes(buffer, places["byteorder"]).strip() != b"little":
        raise InputError(f"`{path}`: written big-endian; save it again on a little-endian machine")
    if places["data.pkl"][1] > PICKLE_BYTES:
        raise InputError(
            f"`{path}`: refused, `data.pkl` has {places['data.pkl'][1]} bytes, expected at most {PICKLE_BYTES}"
        )
    # `set_crc32_options(False)` leaves all of them 0.
    stored = {member.filename: member.CRC for member in members} if any(member.CRC for member in members) else {}
    sums = {name: stored[prefix + name] for name in places if prefix + name in stored}
    if "data.pkl" in sums:
        _check_sum(path, "`data.pkl`", buffer, places["data.pkl"], sums["data.pkl"])
    root = read_pickle_stream(io.BytesIO(_bytes(buffer, places["data.pkl"])), f"`{path}`")
    data = {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}
    script = f"{prefix}constants.pkl" in names
    data_sums = {name.removeprefix("data/"): value for name, value in sums.items() if name.startswith("data/")}
    return TorchFile(path, "TorchScript" if script else "zip", root, buffer, data, data_sums)


def _check_sum(path: Path, what: str, buffer: mmap.mmap, place: tuple[int, int], expected: int) -> None:
    start, size = place
    with memoryview(buffer) as whole:
        intact = zlib.crc32(whole[start : start + size]) == expected
    if not intact:
        raise InputError(
            f"`{path}`: {what}: its bytes do not match the zip's CRC-32; the file is damaged, copy or download it again"
        )


def _directory_bytes(buffer: mmap.mmap) -> int:
    """What the two forms of a zip's last record say of the size of its directory; the larger one."""
    sizes = [0]
    for mark, place, width in ((b"PK\x05\x06", 12, 4), (b"PK\x06\x06", 40, 8)):
        found = buffer.rfind(mark, max(0, len(buffer) - _TAIL))
        size = int.from_bytes(buffer[found + place : found + place + width], "little") if found >= 0 else 0
        sizes.append(0 if size == 0xFFFFFFFF else size)
    return max(sizes)


def _member_place(path: Path, buffer: mmap.mmap, member: zipfile.ZipInfo) -> tuple[int, int]:
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise InputError(
            f"`{path}`: refused, zip record {member.filename!r} is compressed ({member.compress_size} bytes that "
            f"unpack to {member.file_size}); torch.save stores without compression, so unpack and save it again"
        )
    header = buffer[member.header_offset : member.header_offset + _LOCAL_HEADER]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = member.header_offset + _LOCAL_HEADER + lengths
    if header[:4] != b"PK\x03\x04" or start + member.file_size > len(buffer):
        raise InputError(f"`{path}`: zip record {member.filename!r} is cut short; copy or download the file again")
    return start, member.file_size


def _open_legacy(path: Path, buffer: mmap.mmap) -> TorchFile:
    name = f"`{path}`"
    first = read_pickle_stream(buffer, name)  # type: ignore[arg-type]
    if first != _LEGACY_MAGIC or isinstance(first, bool):
        return TorchFile(path, "pickle", first, buffer, {})
    root, places, _ = _legacy_body(buffer, len(buffer), name)  # type: ignore[arg-type]
    return TorchFile(path, "legacy", root, buffer, places)


def _legacy_body(
    file: IO[bytes], end: int, name: str
) -> tuple[Any, dict[str, tuple[int, int]], dict[str, StorageRecord]]:
    """What follows the magic number: the object, the places of its storages, and the storages it mentions."""
    storages: dict[str, StorageRecord] = {}
    protocol, system = read_pickle_stream(file, name), read_pickle_stream(file, name)
    if protocol != _LEGACY_PROTOCOL or not (isinstance(system, dict) and system.get("little_endian", True)):
        raise InputError(f"{name}: not of legacy protocol {_LEGACY_PROTOCOL} and little-endian; save it anew")
    root = read_pickle_stream(file, name, storages)
    keys = read_pickle_stream(file, name)
    places: dict[str, tuple[int, int]] = {}
    for key in [key for key in keys if isinstance(key, (str, int))] if isinstance(keys, list) else []:
        record = storages.get(str(key))
        numel = int.from_bytes(file.read(8), "little")
        start = file.tell()
        if record is None or numel != record.numel or start + numel * record.dtype.itemsize > end:
            expected = f"{record.numel:.3g} numbers" if record else "no such storage"
            raise InputError(
                f"{name}: storage {str(key)[:40]!r} claims {numel:.3g} numbers, expected {expected} within the file; "
                "refused before allocation, copy or download it again"
            )
        places[str(key)] = (start, numel * record.dtype.itemsize)
        file.seek(start + numel * record.dtype.itemsize)
    return root, places, storages


def _nested_numbers(content: bytes, name: str) -> Tensor:
    file = io.BytesIO(content)
    if read_pickle_stream(file, name) != _LEGACY_MAGIC:
        raise InputError(f"{name}: not a nested storage; copy or download the file again")
    root, places, _ = _legacy_body(file, len(content), name)
    if not isinstance(root, StorageRecord) or root.key not in places:
        raise InputError(f"{name}: not a nested storage; copy or download the file again")
    start, size = places[root.key]
    return _from_bytes(bytearray(memoryview(content)[start : start + size]), root.dtype, root.numel, 0)


def _from_bytes(buffer: mmap.mmap | bytearray, dtype: torch.dtype, numel: int, start: int) -> Tensor:
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:  # frombuffer would give misaligned numbers
        buffer, start = bytearray(buffer[start : start + numel * dtype.itemsize]), 0
    return torch.frombuffer(buffer, dtype=dtype, count=numel, offset=start)


def _as_dtype(flat: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The same bytes as other numbers (an untyped storage holds bytes)."""
    if flat.numel() * flat.dtype.itemsize % dtype.itemsize:
        raise InputError(
            f"{name}: its storage of {flat.numel()} {flat.dtype} is no whole number of {dtype}; get it again"
        )
    return flat.view(dtype)


def _bytes(buffer: mmap.mmap, place: tuple[int, int]) -> bytes:
    return buffer[place[0] : place[0] + place[1]]


def _brief(size: tuple[int, ...]) -> str:
    return f"({', '.join(f'{n:.3g}' if n > 10**9 else str(n) for n in size[:DIMENSIONS])})"
