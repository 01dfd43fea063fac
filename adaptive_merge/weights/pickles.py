"""A pickle reader that runs nothing: every name in the file becomes an inert stub.

Published experts are often whole modules saved by `torch.save(model)` or `pickle.dump(model)`. Loading those the
ordinary way imports and calls whatever the file names. Here a pickle is read in two passes: first its opcodes are
checked (`checked_span`), then it is unpickled with a `find_class` that never imports: tensor rebuilders give
descriptions of tensors (`TensorRecord`), all other names give `Stub` classes that only remember their state.
No torch object is built while the pickle is read, so a forged size allocates nothing. The unpickler is the one that is
written in Python: it lets each key be looked at before it is hashed, for a tuple that holds one tuple twice, and so on
forty times, has a hash that takes years.
"""

from __future__ import annotations

# The only place in this package that reads pickles; nothing in it resolves a name from the file to real code.
import pickle  # noqa: S403
import pickletools
from collections.abc import Callable, Iterable
from typing import IO, Any, ClassVar, Final

import torch

from adaptive_merge.errors import InputError
from adaptive_merge.limits import OPCODES, TUPLE_KEYS, LimitError
from adaptive_merge.upstream import PythonUnpickler
from adaptive_merge.weights.stubs import (
    DTYPE_NAMES,
    DTYPES,
    REBUILDERS,
    Mapping,
    Rebuilder,
    StorageRecord,
    Stub,
    TensorRecord,
    plain_bytes,
)

__all__ = ["Mapping", "StorageRecord", "Stub", "TensorRecord", "checked_span", "read_pickle_stream"]

_INT_KEYS: Final = 2**60  # larger ones can be made to have one hash, so that a dictionary of them takes the square
_SLACK: Final = 1 << 16  # bytes and items that a pickle may make beyond its own length
_FORBIDDEN: Final = frozenset({"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"})


def checked_span(file: IO[bytes], name: str) -> int:
    """The offset just behind the pickle that starts at the current position; the position is left unchanged.

    Raises:
        InputError: the pickle is cut short, or uses opcodes or sizes that no saved model needs.
    """
    start, count = file.tell(), 0
    try:
        for opcode, argument, position in pickletools.genops(file):
            count += 1
            if opcode.name in _FORBIDDEN:
                raise InputError(f"{name}: refused, pickle opcode {opcode.name} at byte {position}")
            too_far = opcode.name in ("LONG_BINPUT", "PUT") and int(argument) > OPCODES
            if count > OPCODES or too_far:
                raise LimitError(
                    f"{name}: refused, the pickle asks for more than {OPCODES:,} objects at byte {position}"
                )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{name}: not a readable pickle ({type(error).__name__}: {error}); the file is damaged or of another "
            "format, so copy or download it again"
        ) from error
    end = file.tell()
    file.seek(start)
    return end


def read_pickle_stream(file: IO[bytes], name: str, storages: dict[str, StorageRecord] | None = None) -> Any:
    """One pickle from the current position on, as stubs, mappings, records and plain Python values.

    Args:
        file: anything with `read`, `readline`, `seek`, `tell`; it is left just behind the pickle.
        name: how error messages call the file.
        storages: filled with every storage that the pickle mentions, by key.
    """
    end = checked_span(file, name)
    try:
        content = _Unpickler(file, storages if storages is not None else {}, end - file.tell()).load()
    except Exception as error:
        raise InputError(
            f"{name}: refused, the pickle does something that no saved model needs ({type(error).__name__}: {error}); "
            "nothing in it was run"
        ) from error
    file.seek(end)
    return content


class _Unpickler(PythonUnpickler):
    """`find_class` is the only door from a name in the file to an object, and it opens on stubs."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes], storages: dict[str, StorageRecord], size: int) -> None:
        super().__init__(file, encoding="latin1")
        self._storages = storages
        self._stubs: dict[str, type[Stub]] = {}
        self._tuples, self._room = 0, size + _SLACK
        self._bounded = {
            ("_codecs", "encode"): Rebuilder(self._latin1_bytes),
            ("collections", "OrderedDict"): Rebuilder(self._mapping),
            # These three torch knows as well: what is harmless here must not be a bomb there.
            ("collections", "Counter"): Rebuilder(self._collection),
            **{(module, "set"): Rebuilder(self._collection) for module in ("builtins", "__builtin__")},
            **{(module, "bytearray"): Rebuilder(plain_bytes) for module in ("builtins", "__builtin__")},
        }

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Refuse what takes long to hash, before it is hashed."""
        for key in keys:
            if isinstance(key, int) and not -_INT_KEYS < key < _INT_KEYS:
                raise pickle.UnpicklingError("a key that is a very large number")
            if isinstance(key, tuple):
                self._tuples += 1
                if self._tuples > TUPLE_KEYS or not _is_small(key):
                    raise pickle.UnpicklingError("keys that are tuples of tuples, or too many tuples")

    def _latin1_bytes(self, text: Any, encoding: Any = "latin1") -> bytes:
        """How protocols 0 to 2 write bytes; all of them together are no longer than the pickle."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes in an unknown encoding")
        self._spend(len(text))
        return text.encode("latin1")

    def _mapping(self, items: Any = ()) -> Mapping:
        pairs = [*(items.items() if isinstance(items, dict) else items)]
        self._spend(len(pairs))
        self.check_keys(key for key, _ in pairs)
        return Mapping(pairs)

    def _collection(self, items: Any = ()) -> Stub:
        self._spend(len(items))
        self.check_keys(items)
        return Stub()

    def _spend(self, amount: int) -> None:
        self._room -= amount
        if self._room < 0:
            raise pickle.UnpicklingError("the same content again and again")

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and name in DTYPE_NAMES:
            return DTYPE_NAMES[name]
        rebuilder = self._bounded.get((module, name)) or REBUILDERS.get((module, name))
        if rebuilder is not None:
            return rebuilder
        origin = f"{module}.{name}"
        if origin not in self._stubs:
            self._stubs[origin] = type("Stub", (Stub,), {"origin": origin})
        return self._stubs[origin]

    def persistent_load(self, pid: Any) -> Any:
        kind = pid[0] if isinstance(pid, tuple) and pid else None
        if kind == "module" and len(pid) == 4:
            return pid[1]
        if kind != "storage" or len(pid) < 5:
            raise pickle.UnpicklingError("an unknown persistent id")
        _, dtype, key, _location, numel = pid[:5]
        if not isinstance(key, (str, int)) or not -_INT_KEYS < (key if isinstance(key, int) else 0) < _INT_KEYS:
            raise pickle.UnpicklingError("a storage whose key is no text")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a storage that is a view of another one")
        if not isinstance(dtype, torch.dtype) or not isinstance(numel, int) or not 0 <= numel < _INT_KEYS * 8:
            raise pickle.UnpicklingError(f"a storage of a {type(numel).__name__} of {type(dtype).__name__}")
        record = self._storages.setdefault(str(key), StorageRecord(dtype, numel, key=str(key)))
        if (record.dtype, record.numel) != (dtype, numel):
            raise pickle.UnpicklingError(f"storage {str(key)[:40]} is named with two sizes or types")
        return record


def _is_small(key: tuple[Any, ...]) -> bool:
    """Whether a tuple holds few values, those of a tuple inside it counted as often as it is there."""
    left, stack = TUPLE_KEYS, [key]
    while stack and left > 0:
        part = stack.pop()
        left -= len(part)
        stack += [child for child in part[: max(left, 0)] if isinstance(child, tuple)]
    return left > 0


def _before(opcode: bytes, keys: Callable[[_Unpickler], Iterable[Any]]) -> None:
    """Look at the keys that an opcode is about to hash."""
    inherited = PythonUnpickler.dispatch[opcode[0]]

    def checked(unpickler: _Unpickler) -> None:
        unpickler.check_keys(keys(unpickler))
        inherited(unpickler)

    _Unpickler.dispatch[opcode[0]] = checked


# What is on the stack since the last mark is what an opcode with a mark takes.
_before(pickle.SETITEM, lambda unpickler: unpickler.stack[-2:-1])
_before(pickle.SETITEMS, lambda unpickler: unpickler.stack[::2])
_before(pickle.DICT, lambda unpickler: unpickler.stack[::2])
_before(pickle.ADDITEMS, lambda unpickler: unpickler.stack)
_before(pickle.FROZENSET, lambda unpickler: unpickler.stack)
