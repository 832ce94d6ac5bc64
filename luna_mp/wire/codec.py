"""Pickle that can hold no code: data travels as pickle's own opcodes, tensors by carrier.

A pickle that names no global can build nothing but None, numbers, strings, bytes, lists, tuples,
sets and dicts, so the reader refuses every global and the writer every object that would need one
(https://docs.python.org/3/library/pickle.html#restricting-globals).
"""

from __future__ import annotations

import io
import itertools
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import torch

from luna_mp.errors import LunaError, Rejected, Unsendable
from luna_mp.wire.stream import Buffer

__all__ = ("Writer", "loads")

# What a reader of arbitrary bytes may raise before it has noticed that they are not a pickle.
_GARBAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


KEPT_UP_TO = 16 << 10  # bytes of a message, after which its pickler is used again

# Most of what a message holds. Each object is asked about, and `isinstance` takes longer.
_PLAIN = frozenset((dict, str, int, float, bool, bytes, tuple, list, type(None)))


class _Foreign(Exception):
    """Raised with an object that cannot be sent, and why."""


class _HasTensor(Exception):
    """Raised at the first tensor of a message that was thought to have none."""


class _Pickler(pickle.Pickler):
    """Writes to its own file messages without tensors, and asks Python about nothing of those."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=5)

    def written(self, message: Mapping[str, Any]) -> bytes:
        self.dump(message)
        pickled = self.file.getvalue()
        self.clear_memo()
        self.file.seek(0)
        self.file.truncate()
        return pickled

    def reducer_override(self, obj: Any) -> NoReturn:
        if isinstance(obj, torch.Tensor):
            raise _HasTensor
        raise _Foreign(obj, f"{type(obj).__name__}: only data and tensors can be sent")


class _TensorPickler(_Pickler):
    """Asks about each object; `pack` and `packed` are those of the message under way."""

    pack: Callable[[torch.Tensor], object]
    packed: dict[int, object]

    def persistent_id(self, obj: Any) -> object:
        if type(obj) in _PLAIN or not isinstance(obj, torch.Tensor):
            return None
        # One tensor in two places crosses once, and is one tensor again on the other side.
        key = id(obj)
        if key not in self.packed:
            try:
                self.packed[key] = (len(self.packed), self.pack(obj))
            except Unsendable as exc:
                raise _Foreign(obj, str(exc)) from exc
        return self.packed[key]


class _Unpickler(pickle.Unpickler):
    unpack: Callable[[Any], torch.Tensor]
    unpacked: list[torch.Tensor]

    def persistent_load(self, pid: Any) -> torch.Tensor:
        index, token = pid
        if index == len(self.unpacked):
            self.unpacked.append(self.unpack(token))
        tensor: torch.Tensor = self.unpacked[index]
        return tensor

    def find_class(self, module: str, name: str) -> NoReturn:
        raise Rejected(f"a message names the object {module}.{name}: only data may cross")


class Writer:
    """Pickles one message after the other: to make a pickler takes longer than to use it."""

    def __init__(self) -> None:
        self._plain: _Pickler | None = None
        self._with_tensors: _TensorPickler | None = None
        #: of the last message; the next one is like it, most often
        self._had_tensors = False

    def dumps(self, message: Mapping[str, Any], pack: Callable[[torch.Tensor], object]) -> bytes:
        """Pickle a message; `pack` gives each tensor's token.

        Raises `Unsendable` with the path to the first value that is not data.
        """
        try:
            pickled = None if self._had_tensors else self._dumped_plain(message)
            return self._dumped(message, pack) if pickled is None else pickled
        except RecursionError as exc:
            raise Unsendable("a value is nested too deeply to be sent") from exc
        except _Foreign as exc:
            culprit, why = exc.args
            raise Unsendable(f"{_path_to(culprit, message)}: {why}") from exc

    # A pickler that fails is not kept, for what it holds; nor is one that large messages made slow.

    def _dumped_plain(self, message: Mapping[str, Any]) -> bytes | None:
        """None where it has a tensor."""
        pickler, self._plain = self._plain or _Pickler(), None
        try:
            pickled = pickler.written(message)
        except _HasTensor:
            return None
        if len(pickled) <= KEPT_UP_TO:
            self._plain = pickler
        return pickled

    def _dumped(self, message: Mapping[str, Any], pack: Callable[[torch.Tensor], object]) -> bytes:
        pickler, self._with_tensors = self._with_tensors or _TensorPickler(), None
        pickler.pack, pickler.packed = pack, {}
        pickled = pickler.written(message)
        self._had_tensors = bool(pickler.packed)
        del pickler.pack, pickler.packed
        if len(pickled) <= KEPT_UP_TO:
            self._with_tensors = pickler
        return pickled


def loads(
    payload: Buffer,
    unpack: Callable[[Any], torch.Tensor],
    discard: Callable[[Any], None] = lambda token: None,
) -> Any:
    """Read a message; `unpack` gives the tensor for a token. Raises `Rejected` for garbage.

    When it cannot be read to its end, `discard` is told of each token that was not unpacked.
    """
    reader = _reader(payload, unpack)
    try:
        return reader.load()
    except BaseException as exc:
        first = len(reader.unpacked)
        del reader
        _forget(exc)
        _discard_from(first, payload, discard)
        if isinstance(exc, _GARBAGE):
            raise Rejected(f"a message of {len(payload)} bytes is not data: {exc}") from exc
        raise


def _reader(payload: Buffer, unpack: Callable[[Any], torch.Tensor]) -> _Unpickler:
    # Each message makes one; a constructor in Python would be a good part of what that takes.
    reader = _Unpickler(io.BytesIO(payload))
    reader.unpack, reader.unpacked = unpack, []
    return reader


def _forget(error: BaseException) -> None:
    """A caller may keep it, and with it each frame that it passed, and tensors in those."""
    for each in (error, error.__cause__):
        if each is not None:
            traceback.clear_frames(each.__traceback__)


def _discard_from(first: int, payload: Buffer, discard: Callable[[Any], None]) -> None:
    numbers = itertools.count()

    def skip(token: Any) -> torch.Tensor:
        if next(numbers) >= first:
            discard(token)
        return torch.empty(0)

    # What cannot be read was the first error, which is on its way to the caller.
    with suppress(LunaError, *_GARBAGE):
        _reader(payload, skip).load()


def _path_to(culprit: object, message: Mapping[str, Any]) -> str:
    for name, value in message.items():
        for path in _paths(culprit, value, name, set()):
            return path
    return "a value"


def _paths(culprit: object, value: Any, path: str, seen: set[int]) -> Iterator[str]:
    if value is culprit:
        yield path
    if id(value) in seen:
        return
    seen.add(id(value))
    if type(value) is dict:
        for key, item in value.items():
            yield from _paths(culprit, key, f"{path}, a key", seen)
            yield from _paths(culprit, item, f"{path}[{_quoted(key)}]", seen)
    elif type(value) in (list, tuple, set, frozenset):
        for index, item in enumerate(value):
            yield from _paths(culprit, item, f"{path}[{index}]", seen)


def _quoted(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)
