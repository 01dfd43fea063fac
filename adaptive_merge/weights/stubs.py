"""What stands in a pickle's content for what is not imported: records of tensors, and stubs that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError  # noqa: S403 (the error alone)
from typing import Any, Final

import torch

__all__ = [
    *("DTYPES", "DTYPE_NAMES", "REBUILDERS", "Mapping", "Rebuilder", "StorageRecord", "Stub", "TensorRecord"),
    "plain_bytes",
]

_MOST_SIZES: Final = 64

DTYPES: Final = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
DTYPE_NAMES: Final = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


@dataclass(frozen=True)
class StorageRecord:
    """A run of numbers inside the file: by `key` (zip record or legacy entry) or as the bytes of a nested file."""

    dtype: torch.dtype
    numel: int
    key: str | None = None
    nested: bytes | None = None

    def __setstate__(self, _state: Any) -> None:
        raise UnpicklingError("the pickle tries to change a checked storage")


@dataclass(frozen=True)
class TensorRecord:
    """The description of a tensor: nothing is allocated until it is asked for."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None  # None: as the storage says

    def __setstate__(self, _state: Any) -> None:
        raise UnpicklingError("the pickle tries to change a checked tensor")


class Stub:
    """Stands for an object of a class that is not imported; keeps its state, does nothing."""

    origin: str = "an unknown object"
    state: dict[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> Stub:
        stub = object.__new__(cls)
        stub.state = {}
        return stub

    def __init__(self, *_: Any, **__: Any) -> None:
        """Arguments are dropped: a stub has no behaviour that they could steer."""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __call__(self, *_: Any, **__: Any) -> Stub:
        return Stub()

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Items of dict-like objects are dropped."""

    def append(self, _value: Any) -> None:
        """Items of list-like objects are dropped."""

    extend = add = append


class Mapping(dict[Any, Any]):
    """Stands for `collections.OrderedDict`; attributes set on it (such as `_metadata`) are dropped."""

    def __setstate__(self, _state: Any) -> None:
        """Nothing but the items matters."""


class Rebuilder:
    """A callable for REDUCE. Slots and a refusing `__setstate__` keep BUILD from rewriting it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _state: Any) -> None:
        raise UnpicklingError("the pickle tries to change a function of the reader")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRecord:
    return _record(storage, offset, size, stride, None)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> TensorRecord:
    return _record(storage, offset, size, stride, dtype)


def _record(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> TensorRecord:
    if not isinstance(storage, StorageRecord) or not isinstance(dtype, torch.dtype | None):
        raise UnpicklingError("a tensor without a storage")
    if not isinstance(size, (tuple, list)) or not isinstance(stride, (tuple, list)) or len(size) > _MOST_SIZES:
        raise UnpicklingError("a tensor whose size or stride is no tuple, or a long one")
    numbers = (offset, *size, *stride[: len(size) + 1])
    if len(size) != len(stride) or not all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers):
        raise UnpicklingError("a tensor whose size and stride do not fit each other")
    return TensorRecord(storage, offset, tuple(size), tuple(stride), dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _nested_storage(content: Any) -> StorageRecord:
    if not isinstance(content, bytes):
        raise UnpicklingError("a nested storage that is not bytes")
    return StorageRecord(torch.uint8, -1, nested=content)


def plain_bytes(content: Any = b"", *_: Any) -> bytes:
    if not isinstance(content, (str, bytes)):
        raise UnpicklingError("bytes of a size, without content")
    return b""


def _reconstructor(cls: Any, *_: Any) -> Stub:
    return cls() if isinstance(cls, type) and issubclass(cls, Stub) else Stub()


REBUILDERS: Final = {
    ("torch._utils", "_rebuild_tensor"): Rebuilder(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Rebuilder(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Rebuilder(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Rebuilder(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Rebuilder(_rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): Rebuilder(_nested_storage),
    ("copyreg", "_reconstructor"): Rebuilder(_reconstructor),
    ("copy_reg", "_reconstructor"): Rebuilder(_reconstructor),
}
